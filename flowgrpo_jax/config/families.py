"""Which family a model is of, by its name or its folder, before anything is loaded."""

import json
from pathlib import Path

from flowgrpo_jax.models import families
from flowgrpo_jax.models.family import Family
from flowgrpo_jax.runtime import paths
from flowgrpo_jax.worlds.row import ROW as EMBEDDED

FAMILIES: tuple[Family, ...] = (*families.FAMILIES, EMBEDDED)
# A hub id says nothing of its family, and asking the hub is for the moment of loading.
_OF_HUB_IDS = families.FAMILIES[0]


def of(model: str) -> Family:
    """The family of a config's `model`: a name, a file, a folder or a hub id.

    A folder tells by the class of its transformer; what cannot be read or is not known
    is taken for the first family, whose code then says what is wrong with it.
    """
    for family in FAMILIES:
        known = {*family.aliases, *family.aliases.values()} - {""}
        if model in known or model.endswith(family.suffixes or ("/",)):
            return family
    kind = _class_name(paths.local(model))
    return next((one for one in FAMILIES if kind in one.class_names), _OF_HUB_IDS)


def _class_name(folder: Path) -> str | None:
    try:
        held = json.loads((folder / "transformer" / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return held.get("_class_name") if isinstance(held, dict) else None


def embedded_worlds() -> tuple[str, ...]:
    """Names of the models whose weights are in this package."""
    return tuple(EMBEDDED.aliases)


def released() -> tuple[str, ...]:
    """Short names of the large models that are known by one."""
    return tuple(name for one in families.FAMILIES for name in one.aliases)
