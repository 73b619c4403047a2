"""Odd and malformed requests to the reward server, and a crowd of clients."""

import argparse
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import server_attack
from benchmarks.attacks.table import Row, row
from flowgrpo_jax.rewards.service import wire

_TOKEN = "token"
_JSON = "application/json"
_SLOW = (
    "import time\n\ndef slow(images, prompts):\n"
    "    time.sleep(1.5)\n    return [1.0] * len(images)\n"
)


def _body(**changes) -> bytes:
    image = wire.image_file(np.zeros((8, 8, 3), np.float32))
    return wire.dump({"images": [image], "prompts": ["a"]} | changes, "json")


def _request(
    body: bytes = b"",
    *headers: str,
    line: str = "POST /score HTTP/1.1",
    length: str | None = None,
    token: str = f"Bearer {_TOKEN}",
    kind: str = _JSON,
) -> bytes:
    given = ["Host: a", f"Authorization: {token}", f"Content-Type: {kind}", *headers]
    if length != "":
        given.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([line, *given, "", ""]).encode("latin-1") + body


# name -> bytes on the connection, and the statuses that are right (0: closed).
REQUESTS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "well": (_request(_body()), (200,)),
    "health": (_request(line="GET /health HTTP/1.1", token=""), (200,)),
    "names": (_request(line="GET /rewards HTTP/1.1"), (200,)),
    "query": (_request(line="GET /health?a=b HTTP/1.1"), (200,)),
    "HTTP/1.0": (_request(_body(), line="POST /score HTTP/1.0"), (200,)),
    "charset": (_request(_body(), kind=f"{_JSON}; charset=utf-8"), (200,)),
    "no token": (_request(_body(), token=""), (401,)),
    "other token": (_request(_body(), token="Bearer x"), (401,)),
    "odd token": (_request(_body(), token="Bearer \xff\xfe"), (400, 401)),
    "no such path": (_request(_body(), line="POST /nope HTTP/1.1"), (404,)),
    "path up": (_request(line="GET /../../etc/passwd HTTP/1.1"), (404,)),
    "long path": (_request(line=f"GET /{'a' * 60_000} HTTP/1.1"), (0, 400, 404, 414)),
    "GET of score": (_request(line="GET /score HTTP/1.1"), (405,)),
    "DELETE": (_request(line="DELETE /score HTTP/1.1"), (405,)),
    "odd method": (_request(line="BREW /score HTTP/1.1"), (400, 405, 501)),
    "HTTP/9.9": (_request(line="GET /health HTTP/9.9"), (0, 200, 400, 505)),
    "no line": (b"\r\n\r\n", (0, 400)),
    "binary": (bytes(range(256)) + b"\r\n\r\n", (0, 400)),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (0, 400)),
    "header without colon": (_request(b"", "no colon"), (400,)),
    "header of 100 kB": (_request(b"", f"X: {'a' * 100_000}"), (0, 400, 431)),
    "2,000 headers": (
        _request(b"", *[f"X-{n}: a" for n in range(2000)]),
        (0, 400, 431),
    ),
    "no length": (_request(_body(), length=""), (411,)),
    "length of 5,000 digits": (_request(_body(), length="9" * 5000), (400, 413)),
    "negative length": (_request(_body(), length="-1"), (400,)),
    "length in letters": (_request(_body(), length="many"), (400, 411)),
    "two lengths": (_request(_body(), "Content-Length: 1"), (400,)),
    "length too large": (_request(_body(), length=str(1 << 40)), (413,)),
    "chunked": (_request(b"0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 411)),
    "form": (_request(_body(), kind="application/x-www-form-urlencoded"), (415,)),
    "no kind": (_request(_body(), kind=""), (415,)),
    "empty body": (_request(b""), (400,)),
    "no JSON": (_request(b"{"), (400,)),
    "deep JSON": (_request(b"[" * 100_000), (400,)),
    "5,000 digits": (_request(b'{"images": ' + b"9" * 5000 + b"}"), (400,)),
    "NaN": (_request(b"NaN"), (400,)),
    "Latin-1": (_request(b'{"images": "\xe9"}'), (400,)),
    "a list": (_request(b"[]"), (400,)),
    "a number": (_request(b"1"), (400,)),
    "no images": (_request(b'{"prompts": []}'), (400,)),
    "images no list": (_request(_body(images=3)), (400,)),
    "images of null": (_request(_body(images=[None])), (400,)),
    "no base64": (_request(_body(images=["&&&&"])), (400,)),
    "no picture": (_request(_body(images=["QUJD"])), (400,)),
    "no prompts": (_request(_body(prompts=None)), (400,)),
    "fewer prompts": (_request(_body(prompts=[])), (400,)),
    "prompt of numbers": (_request(_body(prompts=[3])), (400,)),
    "unknown reward": (_request(_body(rewards=["nope"])), (404,)),
    "rewards no list": (_request(_body(rewards="x")), (400,)),
    "rewards of null": (_request(_body(rewards=[None])), (400, 404)),
    "20,000 names": (_request(_body(rewards=["x"] * 20_000)), (400, 404)),
    "a picture that says 60,000 x 60,000": (
        _request(
            wire.dump(
                {"images": [server_attack.png(60_000, 60_000)], "prompts": ["a"]},
                "json",
            )
        ),
        (400, 413),
    ),
    "msgpack for JSON": (_request(b"\x81\xa6images\x90"), (400,)),
    "JSON for msgpack": (_request(_body(), kind="application/msgpack"), (400,)),
}


def rows() -> Iterator[Row]:
    os.environ["ATTACK_TOKEN"] = _TOKEN
    yield _odd(
        server_attack.Server(server_attack.NAME, ".", "--token_env=ATTACK_TOKEN")
    )
    yield _crowd()
    yield _stopped()


def _status(port: int, data: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # it may have answered before it had read everything
        try:
            answer = connection.recv(4096)
        except OSError:
            return 0
    found = re.match(rb"HTTP/1\.[01] (\d+)", answer)
    return int(found[1]) if found else 0


def _odd(server: server_attack.Server) -> Row:
    while not any("ready" in line for line in server.told):
        time.sleep(0.1)
    outcomes = []
    for name, (data, right) in REQUESTS.items():
        status = _status(server.port, data)
        outcomes.append(None if status in right else f"{name}: {status}")
    ended = server.ends(signal.SIGTERM)
    if any("Traceback" in line for line in server.told):
        outcomes.append("a traceback")
    if ended > server_attack.ENDS_S:
        outcomes.append(f"ended after {ended:.0f} s")
    return row(
        "odd and malformed requests to the reward server",
        outcomes,
        "2xx where they can be served, the right 4xx, no traceback",
    )


def _crowd() -> Row:
    asked = argparse.Namespace(idle=200, dripping=40, clients=32, requests=5, size=64)
    told, right = server_attack.crowd(asked)
    return row(
        "32 clients x 5 requests beside 200 idle and 40 dripping connections, and bombs",
        [None if right else "; ".join(told).replace("|", " ")],
        "all served; ended in time",
    )


def _stopped() -> Row:
    """SIGTERM while 12 requests are scored by a reward that takes 1.5 s."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "slowly.py").write_text(_SLOW)
        server = server_attack.Server("slowly.slow", folder)
        while not any("ready" in line for line in server.told):
            time.sleep(0.1)
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(server_attack.post(server.url, _body(), "json"))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        ended = server.ends(signal.SIGTERM)
        for thread in threads:
            thread.join()
    finished = sum(status == 200 for status in statuses)
    tidy = ended <= server_attack.ENDS_S and set(statuses) <= {0, 200, 503}
    return row(
        "SIGTERM under 12 requests of 1.5 s",
        [None if tidy and finished else f"{statuses}, ended after {ended:.0f} s"],
        f"{finished} of 12 finished within the time of grace, ended in {ended:.0f} s",
    )
