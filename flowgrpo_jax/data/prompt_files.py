"""Reads prompts from files; refuses, with file and line, what no run could use."""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import paths, resolution

DEEPEST = 32  # levels of objects and lists within each other
_TOO_DEEP = f"values nested more than {DEEPEST} deep"
_BOM = "\ufeff"  # at the start of a file, so within one that was joined from several
# Separators, control and format characters: a prompt of only these is empty.
_BLANK = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})


def load_prompts(path: str | Path, key: str = "prompts") -> list[Prompt]:
    """Reads a `.txt` (a prompt per line) or `.jsonl` (an object with "prompt").

    The metadata of a JSON line is the whole object, and `index` counts lines from 0.
    Its "resolution", if it has one, is the size of the prompt's pictures.
    Blank lines at the end of the file are ignored. A UserError names `key`, the file
    and, where there is one, the line. Rewards check what they need in a record themselves
    (`prompt_checks`).
    """
    path = paths.local(path)
    if path.suffix not in _PARSERS:
        raise UserError(f"{key}: {path}: must end with {' or '.join(_PARSERS)}")
    parse = _PARSERS[path.suffix]
    prompts = []
    for index, line in enumerate(_lines(path, key)):
        try:
            if not line:
                raise ValueError("empty prompt: remove the line or fill it")
            text, record = parse(line)
            prompts.append(Prompt(checked(text), record, index))
        except ValueError as error:
            raise UserError(f"{key}: {path}:{index + 1}: {error}") from error
    if not prompts:
        raise UserError(f"{key}: {path}: the file is empty: give one prompt a line")
    return prompts


def _lines(path: Path, key: str) -> list[str]:
    """The stripped lines of a UTF-8 file, without the blank ones at its end."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("is no file")  # reading a pipe would wait for its writer
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{key}: {path}:{line}: must be UTF-8 text ({error})"
        ) from error
    except (OSError, ValueError) as error:  # ValueError for a NUL in a path
        reason = getattr(error, "strerror", None) or error
        absent = isinstance(error, FileNotFoundError)
        where = (
            ": a config says at its top where its prompts are from" if absent else ""
        )
        raise UserError(f"{key}: {path}: cannot be read ({reason}){where}") from error
    # Not splitlines(): it also cuts at separators that may stand inside a prompt.
    text = text.rstrip()
    lines = [line.strip().removeprefix(_BOM).strip() for line in text.split("\n")]
    return lines if text else []


def checked(text: str) -> str:
    """The text without spaces around it; ValueError if it cannot be a prompt."""
    _check_characters(text)
    if all(unicodedata.category(letter) in _BLANK for letter in text):
        raise ValueError("empty prompt: has no visible character")
    if "\0" in text:
        raise ValueError("has a NUL character: must be UTF-8 text")
    return text.strip()


# -- parsers: a line -> (text, metadata); a ValueError says what is wrong with it ------


def _parse_text(line: str) -> tuple[str, Mapping[str, Any]]:
    return line, {}


def _parse_json(line: str) -> tuple[str, Mapping[str, Any]]:
    record = _record(line)
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('must be an object with a non-empty "prompt" text')
    if not isinstance(record.get("tag", ""), str):
        raise ValueError('its "tag", the task, must be a text; or leave it out')
    try:
        resolution.parse(record.get("resolution", 0))
    except ValueError as error:
        raise ValueError(f'its "resolution" {error}; or leave it out') from error
    return text, record


def _record(line: str) -> Any:
    """The value of a line of JSON; refuses what other readers could read differently."""
    try:
        record = json.loads(
            line,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON ({error.msg}: column {error.colno})"
        ) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if _is_deep(record):
        raise ValueError(_TOO_DEEP)
    if "\\u" in line:  # only such an escape can write half of a character
        _check_characters(json.dumps(record, ensure_ascii=False))
    return record


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{half} is half of a character (a cut emoji): remove or repair it"
        ) from error


def _whole_number(digits: str) -> int:
    # Reward servers and their message formats hold 64 bits.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(
            f"the number {digits[:20]}... has more than 64 bits: write it as a text"
        )
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(
            f"{digits[:20]} is no number of JSON: write null or leave it out"
        )
    return float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} stands there twice")
    return record


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


_PARSERS: dict[str, Callable[[str], tuple[str, Mapping[str, Any]]]] = {
    ".txt": _parse_text,
    ".jsonl": _parse_json,
}
