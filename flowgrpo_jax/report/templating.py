"""Fills the templates of the pages; names, prompts and paths in them are escaped."""

import base64
import functools
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **values: Any) -> Markup:
    """Fills the template of this name in templates/; a missing value raises."""
    return Markup(_environment().get_template(template).render(**values))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flowgrpo_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "\n".join(map(_file, ("vendor/uPlot.iife.min.js", "page.js")))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(_file("style.css")),
        "plot_style": Markup(_file("vendor/uPlot.min.css")),
        "script": Markup(script),
        "script_digest": digest,
    }
    return environment


def _file(name: str) -> str:
    return resources.files("flowgrpo_jax.report").joinpath(name).read_text()
