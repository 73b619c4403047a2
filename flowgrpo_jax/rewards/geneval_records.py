"""Checks what the record of a GenEval prompt holds before an image is scored by it."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from flowgrpo_jax.data.geneval_grammar import RELATIONS

Names = Collection[str] | None
_KEYS = {
    "include": ("class", "count", "color", "position"),
    "exclude": ("class", "count"),
}


def check(
    record: Mapping[str, Any], classes: Names = None, colors: Names = None
) -> None:
    """ValueError for a record that cannot be scored; it goes on from "the prompt".

    `classes` and `colors` are the words that the detector knows; None allows any.
    """
    if not {"tag", "include"} <= set(record):
        raise ValueError(
            'has no GenEval record ("tag" and "include"): use GenEval prompts'
        )
    if not isinstance(record["tag"], str):
        raise ValueError(f"has tag {_shown(record['tag'])}: must be a text")
    if not record["include"]:
        raise ValueError(f"has include {_shown(record['include'])}: must have a clause")
    for part in ("include", "exclude"):
        clauses = record.get(part, [])
        if not isinstance(clauses, list | tuple):
            raise ValueError(f"has {part} {_shown(clauses)}: must be a list")
        for number, clause in enumerate(clauses):
            _check_clause(part, number, clause, classes, colors)


def _check_clause(
    part: str, number: int, clause: Any, classes: Names, colors: Names
) -> None:
    where = f"has {part}[{number}]"
    keys = _KEYS[part]
    if not isinstance(clause, Mapping):
        raise ValueError(f"{where} {_shown(clause)}: must be an object of {keys}")
    for key in clause:
        if key not in keys:
            raise ValueError(f"{where}.{key}: is not followed: must be one of {keys}")
    for key in ("class", "count"):
        if key not in clause:
            raise ValueError(f"{where} without {key}")
    count = clause["count"]
    if not _is_whole(count) or count < 1:
        raise ValueError(
            f"{where}.count {_shown(count)}: must be a whole number, at least 1"
        )
    _check_word(f"{where}.class", clause["class"], classes)
    if "color" in clause:
        _check_word(f"{where}.color", clause["color"], colors)
    if "position" in clause:
        _check_position(f"{where}.position", clause["position"], number)


def _check_position(where: str, position: Any, number: int) -> None:
    pair = isinstance(position, list | tuple) and len(position) == 2
    relation, target = position if pair else (None, -1)
    if relation not in RELATIONS or not _is_whole(target):
        raise ValueError(
            f"{where} {_shown(position)}: must be one of {RELATIONS} and the number of "
            "the clause it is seen from, counted from 0"
        )
    if not 0 <= target < number:
        raise ValueError(
            f"{where} {_shown(position)}: must name an earlier clause than {number}"
        )


def _check_word(where: str, word: Any, known: Names) -> None:
    if not isinstance(word, str) or not word:
        raise ValueError(f"{where} {_shown(word)}: must be a text")
    if known is not None and word not in known:
        near = [name for name in known if word in name]
        near += difflib.get_close_matches(word, known, 3)
        raise ValueError(
            f"{where} {_shown(word)}: the detector does not know it: must be one of "
            f"{', '.join(near or known)}"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return repr(value)[:60]
