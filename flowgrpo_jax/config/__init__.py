"""The config of a run: keys, recipes, rules and overrides. Nothing is made of it here."""

from flowgrpo_jax.config.keys import (
    ALIASES,
    EMBEDDED,
    MAY_DIFFER,
    OPEN,
    SD3,
    base,
    for_model,
    from_json,
    get,
    is_embedded,
    make,
    not_one_of,
    parse_argument,
    unknown_key,
)

__all__ = [
    "ALIASES",
    "EMBEDDED",
    "MAY_DIFFER",
    "OPEN",
    "SD3",
    "base",
    "for_model",
    "from_json",
    "get",
    "is_embedded",
    "make",
    "not_one_of",
    "parse_argument",
    "unknown_key",
]
