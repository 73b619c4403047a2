"""The config of a run: keys, recipes, rules and overrides. Nothing is made of it here."""

from flowgrpo_jax.config.keys import (
    ALIASES,
    MAY_DIFFER,
    OPEN,
    assign,
    base,
    for_model,
    from_json,
    get,
    make,
    parse_argument,
    unknown_key,
)
from flowgrpo_jax.config.overrides import load_config as load

__all__ = [
    "ALIASES",
    "MAY_DIFFER",
    "OPEN",
    "assign",
    "base",
    "for_model",
    "from_json",
    "get",
    "load",
    "make",
    "parse_argument",
    "unknown_key",
]
