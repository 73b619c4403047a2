"""Servers that answer badly, and addresses that are none: one line, in time."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from benchmarks.attacks.table import Row, one_line, row
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.registry import Combined
from flowgrpo_jax.rewards.scoring import Scorer
from flowgrpo_jax.rewards.service.client import Remote
from flowgrpo_jax.rewards.service.judge import Judge

_DEADLINE = 3.0  # seconds of a call to a bad server
_LATE = 3.0  # more than the deadline is a failure
_IMAGES = np.zeros((2, 8, 8, 3), np.float32)
_PROMPTS = [Prompt("a"), Prompt("b")]
Talk = Callable[[socket.socket], None]


def _http(body: bytes, status: str = "200 OK", headers: str = "") -> Talk:
    """A server that answers with that body."""

    def talk(connection: socket.socket) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(head.encode() + body)

    return talk


def _drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(60):
        connection.sendall(b"x")
        time.sleep(0.2)


def _flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 400000000\r\n\r\n")
    for _ in range(400):
        connection.sendall(b"x" * 1_000_000)


def _own(scores: str) -> Talk:
    return _http(b'{"rewards": {"mine": {"mine": ' + scores.encode() + b"}}}")


ANSWERS: dict[str, Talk] = {
    "closes": lambda c: None,
    "silent": lambda c: time.sleep(10),
    "drips": _drip,
    "floods": _flood,
    "no HTTP": lambda c: c.sendall(b"\0\1\2\3\r\n\r\n"),
    "short body": lambda c: c.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"
    ),
    "many headers": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000),
    "500": _http(b"broken", "500 Internal Server Error"),
    "404": _http(b"nothing", "404 Not Found"),
    "401": _http(b"no", "401 Unauthorized"),
    "503": _http(b"later", "503 Service Unavailable"),
    "redirect": _http(b"", "302 Found", "Location: http://127.0.0.1:9/\r\n"),
    "escapes": _http(b"\x1b[31mred\x1b[0m", "400 Bad Request"),
    "empty": _http(b""),
    "a page": _http(b"<html></html>"),
    "a list": _http(b"[1, 2]"),
    "no scores": _http(b"{}"),
    "one score": _own("[1.0]"),
    "texts": _own('["a", "b"]'),
    "nested": _own("[[1.0], [2.0]]"),
    "NaN": _own("[NaN, 1.0]"),
    "infinite": _own("[Infinity, 1.0]"),
    "400 digits": _own("[" + "9" * 400 + ", 1]"),
    "5,000 digits": _own("[" + "9" * 5000 + ", 1]"),
    "deep": _own("[" * 100_000),
}
STARTS: dict[str, Talk] = {
    "closes": ANSWERS["closes"],
    "silent": ANSWERS["silent"],
    "a page": ANSWERS["a page"],
    "deep": _http(b"[" * 100_000),
    "names that are none": _http(b'{"rewards": 3}'),
    "other rewards": _http(b'{"rewards": ["other"]}'),
}
JUDGEMENTS: dict[str, Talk] = {
    "a page": ANSWERS["a page"],
    "no choices": _http(b'{"choices": []}'),
    "no text": _http(b'{"choices": [{"message": {"content": null}}]}'),
    "no number": _http(b'{"choices": [{"message": {"content": "good"}}]}'),
    "out of range": _http(b'{"choices": [{"message": {"content": "Score: 9000"}}]}'),
    "5,000 digits": _http(
        b'{"choices": [{"message": {"content": "Score: ' + b"9" * 5000 + b'"}}]}'
    ),
    "deep": _http(b"[" * 100_000),
}
URLS = (
    "file:///etc/hostname",
    "ftp://127.0.0.1/",
    "",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:port",
    "http://[::1",
    "http://",
    "http://someone:hunter2@127.0.0.1:9",  # nor may the line tell the password
)


@contextmanager
def _server(talk: Talk, first: Talk | None = None) -> Iterator[str]:
    """A server on loopback that talks so to all (`first`: to its first client)."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def answer(connection: socket.socket, how: Talk) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                how(connection)
            except OSError:
                pass  # the client has had enough

    def serve() -> None:
        count = 0
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            how = first if first is not None and count == 0 else talk
            threading.Thread(target=answer, args=(connection, how), daemon=True).start()
            count += 1

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


def _in_time(name: str, call: Callable[[], object]) -> str | None:
    begin = time.monotonic()
    outcome = one_line(call)
    if outcome is None and time.monotonic() - begin > _DEADLINE + _LATE:
        outcome = "late"
    return outcome and f"{name}: {outcome}"


def _remote(url: str, **options) -> Remote:
    options = {"timeout": 1.0, "deadline": _DEADLINE, "retries": 1} | options
    return Remote("mine", server=url, **options)


def _scored(url: str) -> object:
    reward = _remote(url)
    scorer = Scorer(Combined({"mine": reward}, {"mine": 1.0}), _DEADLINE + 1)
    return scorer(_IMAGES, _PROMPTS)


def _judged(url: str) -> object:
    judge = Judge(
        "judge",
        url=url,
        model="m",
        template="{prompt}",
        pattern=r"Score: (\d+)",
        timeout=1.0,
        deadline=_DEADLINE,
        retries=0,
    )
    scorer = Scorer(Combined({"judge": judge}, {"judge": 1.0}), _DEADLINE + 1)
    return scorer(_IMAGES, _PROMPTS)


def rows() -> Iterator[Row]:
    ready = _http(b'{"rewards": ["mine"]}')
    outcomes = []
    for name, talk in ANSWERS.items():
        with _server(talk, first=ready) as url:
            outcomes.append(_in_time(name, lambda url=url: _scored(url)))
    for name, talk in STARTS.items():
        with _server(talk) as url:
            outcomes.append(_in_time(f"start: {name}", lambda url=url: _remote(url)))
    yield row(
        f"remote client against bad servers ({len(ANSWERS)} answers, "
        f"{len(STARTS)} starts)",
        outcomes,
        "one line within the deadline",
    )
    outcomes = []
    for name, talk in JUDGEMENTS.items():
        with _server(talk) as url:
            outcomes.append(_in_time(name, lambda url=url: _judged(url)))
    yield row("judge client against bad servers", outcomes, "one line")
    yield row(
        "urls: file, ftp, empty, ports, half a bracket, no host, a password",
        [_in_time(url, lambda url=url: _remote_at(url)) for url in URLS],
        "one line",
    )


def _remote_at(url: str) -> Remote:
    try:
        return _remote(url, deadline=1.0)
    except UserError as error:
        assert "hunter2" not in str(error), "tells the password"
        raise
