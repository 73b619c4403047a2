"""A config as text: one line a key, those that differ from the defaults first."""

from collections.abc import Iterator
from typing import Any

import ml_collections

from flowgrpo_jax.config.keys import OPEN, base, get


def listing(config: ml_collections.ConfigDict) -> str:
    """Every key and its value; where a default was changed, the default too.

    The defaults are those of `keys.base`, before a recipe, a family or a config file.
    Groups whose names are the user's, such as `reward`, stand in one line each.
    """
    defaults = base()
    changed, unchanged = [], []
    for key, value in _leaves(config):
        default = _plain(get(defaults, key))
        if value == default:
            unchanged.append(f"{key} = {value!r}")
        else:
            changed.append(f"{key} = {value!r}  (default {default!r})")
    return "\n".join(
        [
            f"# {len(changed)} differ from the defaults",
            *changed,
            f"# {len(unchanged)} are as by default",
            *unchanged,
        ]
    )


def _leaves(
    group: ml_collections.ConfigDict, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, in the order of the alphabet."""
    for name in group:
        key, value = f"{prefix}{name}", group[name]
        if isinstance(value, ml_collections.ConfigDict) and key not in OPEN:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, _plain(value)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
