"""Fills the templates of the pages; names, prompts and paths in them are escaped."""

import functools
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
    style = resources.files("flowgrpo_jax.report").joinpath("style.css").read_text()
    environment.globals["style"] = Markup(style)
    return environment
