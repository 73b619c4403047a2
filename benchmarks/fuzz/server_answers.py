"""What reward servers and judges answer: statuses, headers, bodies, cut anywhere.

Answers go through the whole client, over a real socket. The oracle reads the answer by
hand: the scores, or that there are none, and then it must be one line that a terminal
can show.
"""

import contextlib
import functools
import json
import math
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgpack
import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz import core
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.service import http
from flowgrpo_jax.rewards.service.client import Remote
from flowgrpo_jax.rewards.service.judge import Judge

COUNT = 2
IMAGES = np.zeros((COUNT, 4, 4, 3), np.float32)
PROMPTS = [Prompt("a"), Prompt("b")]
NAME = "score"
_GOOD = {"own": '{"rewards": ["score"]}', "judge": '{"data": []}'}
_DEADLINE, _PAUSE = 60.0, 100.0  # seconds; so nothing is asked a second time

_texts = st.one_of(
    st.sampled_from([NAME, "other", "\x1b[31m", "\ud83d", "Final Score: 4", "é😀"]),
    st.text(max_size=12),
    st.from_regex(r"(Final )?Score:? ?[0-9.]{0,12}", fullmatch=True),
)
_numbers = st.one_of(
    st.integers(-9, 9),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**64, True, 1e308]),
)
_values = st.recursive(
    st.none() | _numbers | _texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=3)
    ),
    max_leaves=10,
)
_columns = st.one_of(
    st.lists(_numbers, min_size=COUNT, max_size=COUNT),
    st.lists(st.none() | _numbers, min_size=COUNT, max_size=COUNT),
    st.lists(_numbers, max_size=4),
    _values,
)
_finite = st.lists(
    st.floats(-1e6, 1e6) | st.integers(-9, 9), min_size=COUNT, max_size=COUNT
)
_tables = st.one_of(
    st.fixed_dictionaries({NAME: _finite}, optional={"other": _columns}),
    st.fixed_dictionaries({NAME: _columns}, optional={"other": _columns}),
    st.dictionaries(_texts, _columns, max_size=3),
    _values,
)
_words = st.builds(lambda a, b: f"{a} Final Score: {b}", _texts, _numbers | _texts)
_bodies = {
    "own": st.builds(lambda table: {"rewards": {NAME: table}}, _tables) | _values,
    "verl": st.builds(lambda column: {"scores": column}, _finite | _columns) | _values,
    "judge": st.builds(
        lambda words: {"choices": [{"message": {"content": words}}]},
        _words | _words | _texts | _values,
    )
    | _values,
}
_RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"9" * 5000,
            b'{"rewards": {"score": {"score": [1, %s]}}}' % (b"9" * 5000),
            b'{"choices": ' + b"[" * 3000,
            b"\xdd\xff\xff\xff\xff",
            b"\x91" * 100_000,
            b"\xff\xfe[\x00]\x00",
            b"<html>\x1b[2J</html>",
        ]
    ),
)
_STATUSES = ["200 OK"] * 60 + [
    *("204 No Content", "302 Found", "400 \x1b[31m", "401 No", "404 No", "500 No"),
    *("503 Later", "200", "99 Low", "999 High", "-1 Minus", "x OK", ""),
]
_HEADERS = [""] * 60 + [
    *("Transfer-Encoding: chunked", "Content-Length: 5", "Content-Length: -1"),
    *("Content-Length: " + "9" * 5000, "Location: http://127.0.0.1:9/", "no colon"),
    *("X: " + "a" * 70_000, "\r\n".join(["A: b"] * 200), "Content-Encoding: gzip"),
]
_STARTS = [None] * 60 + [b"[]", b"{}", b"null", b"[" * 100_000, b"9" * 5000, b"\x1b[2J"]
_STARTS += [b'{"rewards": 5}', b'{"rewards": [[]]}', b'{"rewards": ["\\u001b[2J"]}']
_STARTS += [
    b'{"rewards": ["score"], "max_pixels": %s}' % n for n in (b"0", b"NaN", b"9" * 99)
]


class Answer(NamedTuple):
    """What a server says when it is first asked, and then to every request."""

    kind: str
    encoding: str
    start: bytes | None
    body: Any
    status: str
    header: str
    cut: int | None


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    kind = draw(st.sampled_from(sorted(_bodies)))
    return Answer(
        kind,
        "json" if kind == "judge" else draw(st.sampled_from(["json", "msgpack"])),
        draw(st.sampled_from(_STARTS)) if kind != "verl" else None,
        draw(_RAW if draw(st.integers(0, 5)) == 0 else _bodies[kind]),
        draw(st.sampled_from(_STATUSES)),
        draw(st.sampled_from(_HEADERS)),
        draw(st.none() | st.none() | st.none() | st.integers(0, 300)),
    )


def check(given: Answer) -> str:
    data = given.body if isinstance(given.body, bytes) else _encoded(given)
    if data is None:
        return core.REFUSED
    lines = [f"HTTP/1.1 {given.status}", given.header or f"Content-Length: {len(data)}"]
    raw = "\r\n".join(lines).encode() + b"\r\n\r\n" + data
    start = (
        given.start if given.start is not None else _GOOD.get(given.kind, "").encode()
    )
    first = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(start) + start
    plain = given.status in ("200 OK", "200") and not given.header
    whole = given.cut is None or given.cut >= len(raw)
    if given.start is not None:  # the oracle does not read what is told at the start
        plain = False
    told = _asked(given, first, raw[: given.cut])
    wanted = _expected(given) if plain and whole else None
    if given.kind == "judge" and given.start not in (None, b"{}") and told is not None:
        if given.start[:1] != b"{":
            raise core.Wrong(f"no server of models, and yet {told}")
    if wanted is not None and told != wanted:
        raise core.Wrong(f"{told} for what must be {wanted}")
    if wanted is None and told is not None and plain and whole:
        if not isinstance(given.body, bytes):
            raise core.Wrong(f"{told} for what must be refused")
    if told is not None and not all(len(column) == COUNT for column in told.values()):
        raise core.Wrong(f"{told}: one number for each image")
    return core.REFUSED if told is None else core.RIGHT


def check_bytes(data: bytes) -> str:
    """Bodies of every kind, by the first byte."""
    kind = ("own", "verl", "judge")[data[0] % 3 if data else 0]
    encoding = "msgpack" if data[:1] > b"\x80" and kind != "judge" else "json"
    given = Answer(kind, encoding, None, data[1:], "200 OK", "", None)
    return check(given)


def _expected(given: Answer) -> dict[str, list[Any]] | None:
    """What is measured, by hand; None for what must be refused."""
    body = given.body
    try:
        if given.kind == "judge":
            return _judged(body["choices"][0]["message"]["content"])
        own = given.kind == "own"
        table = body["rewards"][NAME] if own else {NAME: body["scores"]}
        if not isinstance(table, dict):
            return None
        columns = {key: _column(values) for key, values in table.items()}
    except (TypeError, KeyError, ValueError, IndexError):
        return None
    if given.encoding == "json" and not _is_json(body):
        return None
    if NAME not in columns or not all(map(math.isfinite, columns[NAME])):
        return None
    if not all(isinstance(key, str) and key.isprintable() for key in columns):
        return None
    return {key: list(map(_shown, column)) for key, column in columns.items()}


def _column(values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != COUNT:
        raise ValueError
    if not all(v is None or isinstance(v, int | float) for v in values):
        raise ValueError
    return [_float(v) for v in values]


def _float(value: Any) -> float:
    if value is None:
        return math.nan
    return math.inf if abs(value) > 1e309 or abs(value) == 10**400 else float(value)


def _judged(words: Any) -> dict[str, list[Any]] | None:
    if not isinstance(words, str):
        return None
    found = None
    for part in words.split("Final Score: ")[1:]:
        digits = ""
        for letter in part:
            if letter not in "0123456789":
                break
            digits += letter
        found = digits or found
    number = float(found) if found else math.nan
    score = number / 5 if 1 <= number <= 5 else math.nan
    return {
        "judge": [_shown(score)] * COUNT,
        "judge_unparsed": [_shown(float(math.isnan(score)))] * COUNT,
    }


def _shown(value: float) -> Any:
    return "nan" if math.isnan(value) else float(value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
        return True
    except ValueError:
        return False


def _encoded(given: Answer) -> bytes | None:
    try:
        if given.encoding == "msgpack":
            return msgpack.packb(given.body)
        return json.dumps(given.body).encode()
    except (OverflowError, UnicodeError):
        return None


def _asked(given: Answer, first: bytes, raw: bytes) -> dict[str, list[Any]] | None:
    """What the client makes of it; None where it refuses in one line."""
    with (
        core.refused() as lines,
        mock.patch.multiple(http, _FIRST_PAUSE=_PAUSE, _LONGEST_PAUSE=_PAUSE),
        _server(first, raw) as url,
    ):
        patient = {"retries": 0, "deadline": _DEADLINE, "timeout": _DEADLINE}
        reward: Remote | Judge
        if given.kind == "judge":
            reward = Judge(
                "judge",
                url=url,
                model="m",
                template="{prompt}",
                pattern="Final Score: ([0-9]+)",
                size=0,
                concurrency=1,
                **patient,
            )
        else:
            protocol = "verl" if given.kind == "verl" else "flowgrpo_jax"
            reward = Remote(
                NAME, server=url, protocol=protocol, encoding=given.encoding, **patient
            )
        table = reward(IMAGES, PROMPTS)
        return {key: list(map(_shown, column)) for key, column in table.items()}
    if lines and (not lines[0].isprintable() or len(lines[0]) > 500):
        raise core.Wrong(f"a line that no terminal should show: {lines[0]!r}")
    return None


@contextlib.contextmanager
def _server(first: bytes, then: bytes) -> Iterator[str]:
    """A url at which these are answered, in turn; `first` only where it is asked."""
    given = [first] if first.partition(b"\r\n\r\n")[2] else []
    port, waiting = _listening()
    waiting.queue.clear()
    for answer in (*given, *[then] * COUNT):
        waiting.put(answer)
    yield f"http://127.0.0.1:{port}"


@functools.cache
def _listening() -> tuple[int, queue.Queue]:
    """A port at which answers of the queue are given, one a connection."""
    server, waiting = socket.create_server(("127.0.0.1", 0)), queue.Queue()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1.0)
                _take(connection)
                with contextlib.suppress(queue.Empty):
                    connection.sendall(waiting.get_nowait())

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1], waiting


def _take(connection: socket.socket) -> None:
    """The whole request."""
    with connection.makefile("rb") as file:
        length = 0
        while (line := file.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        file.read(length)


def surface() -> core.Surface:
    seeds = [
        b'\x00{"rewards": {"score": {"score": [1, 2.5]}}}',
        b'\x01{"scores": [1, 2]}',
        b'\x02{"choices": [{"message": {"content": "Final Score: 4"}}]}',
        b"\x81" + msgpack.packb({"rewards": {NAME: {NAME: [1, 2.5]}}}),
    ]
    return core.Surface("server_answers", answers(), check, seeds, check_bytes)
