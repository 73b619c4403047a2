"""Prompt files, and the records that GenEval's reward and OCR read from them.

A draw is a list of lines: records that are right, the same with one part replaced by
any JSON value, texts, and pieces of files of other kinds, in several encodings and with
several ends of lines. The oracle reads the same bytes line by line with Python's own
decoder and json, and knows by a grammar of its own which records can be scored.
"""

import json
import math
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz import core
from flowgrpo_jax.assemble import prompt_checks
from flowgrpo_jax.data.geneval_grammar import COCO, TASKS, enumerate_requests, record
from flowgrpo_jax.data.prompt_files import DEEPEST, load_prompts
from flowgrpo_jax.rewards import geneval, ocr
from flowgrpo_jax.rewards.registry import Context

_RECORDS = [
    record(request)
    for task in TASKS
    for number, request in enumerate(enumerate_requests(COCO, task))
    if number % 301 == 0
]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["", " ", "cat", "red", "left of", '"hi"', "\ud83d", "\0", "\ufeff"]
    ),
    st.sampled_from([2**64, -(2**63) - 1, 10**30, 1e308, 1.0, 0, "1"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=6,
)
_PIECES = [
    *("", " ", "a cat", "a \u00e9t\u00e9", '"a sign"', "null", "[]", "3", '"x"', "{}"),
    *("\ufeff", "\u200b", "\x0c", "\x00", '{"prompt": "a", "prompt": "b"}', "{'a': 1}"),
    *('{"prompt": "a", "x": 1e999}', '{"prompt": "a", "x": -Infinity}', "{" * 9),
    *('{"prompt": "a", "x": NaN}', '{"prompt": "a"}}', "[" * 5000, '{"x": ' * 5000),
    '{"prompt": "a", "x": ' + "7" * 5000 + "}",
    '{"prompt": "a", "x": ' + "[" * DEEPEST + "]" * DEEPEST + "}",
    r'{"prompt": "a \ud83d\ude00"}',
    r'{"prompt": "a \ude00\ud83d"}',
]


@st.composite
def _damaged(draw: st.DrawFn) -> Any:
    """A record of the benchmark with one part, at any depth, taken out or replaced."""
    made = json.loads(json.dumps(draw(st.sampled_from(_RECORDS))))
    node: Any = made
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return made
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and draw(st.booleans()):
            node = node[key]
            continue
        match draw(st.sampled_from(["replace", "replace", "remove", "beside", "none"])):
            case "replace":
                node[key] = draw(_VALUES)
            case "remove":
                del node[key]
            case "beside" if isinstance(node, dict):
                node[draw(st.sampled_from(["x", "tag", "color", "count"]))] = draw(
                    _VALUES
                )
        return made


_GOOD = st.sampled_from(_RECORDS).map(json.dumps)
_LINES = st.one_of(
    _GOOD,
    _damaged().map(json.dumps),
    _VALUES.map(json.dumps),
    st.sampled_from(_PIECES),
    st.text(max_size=20),
)


@st.composite
def _files(draw: st.DrawFn) -> tuple[str, bytes]:
    lines = draw(st.lists(_GOOD, max_size=3))
    if not lines or draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(_LINES))
    text = draw(st.sampled_from(["\n", "\n", "\n", "\r\n", "\r"])).join(lines)
    encodings = [*["utf-8"] * 8, "utf-8-sig", "utf-16", "utf-16-le", "cp1252"]
    data = text.encode(draw(st.sampled_from(encodings)), "replace")
    suffix = draw(st.sampled_from([*[".jsonl"] * 6, ".txt", ".csv"]))
    return suffix, data


class _Detector:
    classes, color_names = COCO.classes, COCO.colors

    def __call__(self, images: Any) -> list:
        return [[] for _ in images]


def surface() -> core.Surface:
    folder = Path(tempfile.mkdtemp())
    made = {
        "geneval": geneval.GenEval(_Detector()),
        "ocr": ocr.OCR(lambda images: []),
    }
    context = Context(made=made)

    def check(given: tuple[str, bytes]) -> str:
        suffix, data = given
        path = folder / f"prompts{suffix}"
        path.write_bytes(data)
        texts = _oracle(suffix, data)
        with core.refused() as lines:
            prompts = load_prompts(path)
        if lines:
            if texts is not None:
                raise core.Wrong(f"refused though right: {lines[0][:200]!r}")
            return core.REFUSED
        if texts is None:
            raise core.Wrong(f"read: {[prompt.text for prompt in prompts]!r}")
        if [prompt.text for prompt in prompts] != texts:
            raise core.Wrong(f"other texts than {texts!r}")
        return _check_records(context, prompts, str(path))

    def check_bytes(data: bytes) -> str:
        return check((".jsonl" if data[:1] in b"{" else ".txt", data))

    seeds = [json.dumps(one).encode() for one in _RECORDS[:8]]
    seeds += [piece.encode("utf-8", "replace") for piece in _PIECES]
    return core.Surface("prompt files", _files(), check, seeds, check_bytes)


def _check_records(context: Context, prompts: list, path: str) -> str:
    """Both rewards' checks against the oracle; what GenEval accepts it can score."""
    outcomes = set()
    for name, can_score in (("geneval", _can_geneval), ("ocr", _can_ocr)):
        first = next((p for p in prompts if not can_score(p)), None)
        with core.refused() as lines:
            prompt_checks.check([name], context, prompts, path)
        if bool(lines) != (first is not None):
            raise core.Wrong(f"{name}: {lines or 'accepted'}, {first}")
        if first is not None and f"{path}:{first.index + 1}: " not in lines[0]:
            raise core.Wrong(f"{name}: another line than {first.index + 1}: {lines[0]}")
        outcomes.add(core.REFUSED if lines else core.RIGHT)
        if name == "geneval" and not lines:
            for prompt in prompts:
                score, _ = geneval.continuous_score(prompt.metadata, [])
                if not math.isfinite(score):
                    raise core.Wrong(f"score {score} of {prompt}")
    return core.RIGHT if core.RIGHT in outcomes else core.REFUSED


# -- the oracle ------------------------------------------------------------------------


def _oracle(suffix: str, data: bytes) -> list[str] | None:
    """The texts of the file; None if it cannot be used."""
    if suffix not in (".txt", ".jsonl"):
        return None
    try:
        whole = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    texts = []
    for line in whole.rstrip().split("\n") if whole.rstrip() else []:
        line = line.strip().removeprefix("\ufeff").strip()
        text = _text(line) if suffix == ".jsonl" else line
        if text is None or "\0" in text or not _visible(text):
            return None
        texts.append(text.strip())
    return texts or None


def _text(line: str) -> str | None:
    try:
        whole = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, _Pairs) or not _is_plain(whole, 0):
        return None
    values = dict(whole)
    text = values.get("prompt")
    return (
        text
        if isinstance(text, str) and isinstance(values.get("tag", ""), str)
        else None
    )


class _Pairs(list):
    """An object as its pairs, so that a key that occurs twice is seen."""


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list):
        if depth == DEEPEST:
            return False
        if isinstance(value, _Pairs):
            names = [name for name, _ in value]
            if len(names) > len(set(names)) or not all(map(_encodes, names)):
                return False
            value = [inner for _, inner in value]
        return all(_is_plain(inner, depth + 1) for inner in value)
    if isinstance(value, str):
        return _encodes(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


def _encodes(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _visible(text: str) -> bool:
    """Whether anything would be seen of it."""
    kinds = {unicodedata.category(letter) for letter in text}
    return bool(kinds - {"Zs", "Zl", "Zp", "Cc", "Cf"})


def _can_ocr(prompt: Any) -> bool:
    parts = prompt.text.split('"')
    return len(parts) > 2 and bool(parts[1].replace(" ", ""))


def _can_geneval(prompt: Any) -> bool:
    wanted = prompt.metadata
    include, exclude = wanted.get("include"), wanted.get("exclude", [])
    return (
        "tag" in wanted
        and isinstance(include, list)
        and isinstance(exclude, list)
        and len(include) > 0
        and all(_is_clause(c, n, True) for n, c in enumerate(include))
        and all(_is_clause(c, n, False) for n, c in enumerate(exclude))
    )


def _is_clause(clause: Any, number: int, included: bool) -> bool:
    if not isinstance(clause, Mapping) or not {"class", "count"} <= set(clause):
        return False
    more = {"color", "position"} if included else set()
    if not set(clause) <= {"class", "count"} | more:
        return False
    if type(clause["count"]) is not int or clause["count"] < 1:
        return False
    if clause["class"] not in COCO.classes:
        return False
    if "color" in clause and clause["color"] not in COCO.colors:
        return False
    if "position" not in clause:
        return True
    position = clause["position"]
    return (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in ("left of", "right of", "above", "below")
        and type(position[1]) is int
        and 0 <= position[1] < number
    )
