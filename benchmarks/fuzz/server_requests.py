"""What arrives at the reward server: heads, bodies, files, in pieces and cut short.

Most of it goes to the connection itself, with a transport that only remembers; one in
fifty through a socket. The oracle says for each request whether it can be scored, and
the scores: images are of one colour each. Nothing may be printed.
"""

import asyncio
import base64
import contextlib
import functools
import http.client
import io
import json
import re
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import msgpack
import numpy as np
import uvicorn
from hypothesis import strategies as st
from PIL import Image

from benchmarks.fuzz import core
from flowgrpo_jax.rewards.server import RewardServer
from flowgrpo_jax.rewards.service.connections import Connection
from flowgrpo_jax.rewards.service.limits import Limits

TYPES = {"json": "application/json", "msgpack": "application/msgpack"}
LIMITS = Limits(
    body=1 << 16, pixels=1 << 12, side=64, values=500, head=9.0, seconds=9.0
)


def red(images, prompts):
    return {"red": images[..., 0].mean((1, 2)), "texts": _lengths(prompts)}


def green(images, prompts):
    return {"green": images[..., 1].mean((1, 2))}


def _lengths(prompts):
    return np.array([len(prompt.text) for prompt in prompts], np.float32)


def _file(kind: str, size: tuple[int, int], colour: Any, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


class Picture(NamedTuple):
    data: Any
    size: tuple[int, int] | None = None  # None: no file that may be accepted
    colour: tuple[int, int, int] = (0, 0, 0)


_RED = _file("png", (8, 8), (255, 0, 0))
PICTURES = (
    Picture(_RED, (8, 8), (255, 0, 0)),
    Picture(_file("png", (8, 8), (51, 102, 0)), (8, 8), (51, 102, 0)),
    Picture(_file("png", (8, 8), 102, "L"), (8, 8), (102, 102, 102)),
    Picture(_file("png", (8, 8), 1, "1"), (8, 8), (255, 255, 255)),
    Picture(_file("png", (4, 8), (0, 255, 0)), (4, 8), (0, 255, 0)),
    Picture(_file("png", (64, 64), (0, 0, 255)), (64, 64), (0, 0, 255)),
    Picture(_file("png", (65, 8), 0)),
    Picture(_file("png", (8, 65), 0)),
    Picture(_file("png", (1000, 1000), 0, "1")),
    Picture(_file("gif", (8, 8), 0, "L")),
    Picture(_RED[:45]),
    Picture(_RED[:40]),
    Picture(_RED.replace(b"IHDR", b"IHDr")),
    Picture(_RED[:16] + b"\x7f\xff\xff\xff" + _RED[20:]),
    Picture(b""),
    Picture(5),
    Picture(None),
    Picture([]),
    Picture("?"),
)
_GOOD = [n for n, picture in enumerate(PICTURES) if picture.size == (8, 8)]

_texts = st.one_of(
    st.sampled_from(
        ["a", "red", "two circles", "é😀", "\ud83d", "\x1b[31m", "a,[{" * 9]
    ),
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "L"]), max_size=3),
)
_numbers = st.one_of(
    st.integers(-9, 9),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 2**64 - 1, 2**64, True, 0.1]),
)
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4)
    ),
    max_leaves=12,
)
_prompts = st.one_of(
    _texts,
    st.fixed_dictionaries(
        {"text": _texts},
        optional={
            "metadata": st.dictionaries(_texts, _values, max_size=3),
            "index": st.integers(0, 99),
        },
    ),
    st.fixed_dictionaries(
        {}, optional={"text": _values, "metadata": _values, "index": _values}
    ),
    _values,
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A body whose images are numbers of PICTURES; usually one that can be scored."""
    well = draw(st.integers(0, 2)) > 0
    count = draw(st.integers(1, 4))
    chosen = st.sampled_from(_GOOD) if well else st.integers(0, len(PICTURES) - 1)
    texts = st.text(st.characters(codec="utf-8"), max_size=20)
    prompt = texts if well and draw(st.booleans()) else _prompts
    body: dict[str, Any] = {
        "images": draw(st.lists(chosen, min_size=count, max_size=count)),
        "prompts": draw(st.lists(prompt, min_size=count, max_size=count)),
    }
    if draw(st.booleans()):
        names = st.sampled_from(["red", "green"])
        body["rewards"] = draw(
            st.lists(names, min_size=1, max_size=2, unique=draw(st.booleans()))
            if well
            else st.lists(names | _values, max_size=3) | _values
        )
    if not well:
        for key in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
            body[key] = draw(_values)
        for key in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
            del body[key]
    return body


_WELL = "POST /score HTTP/1.1"
_LINES = st.sampled_from(
    [
        *[_WELL] * 12,
        *("GET /score HTTP/1.1", "POST /health HTTP/1.1", "POST /score/ HTTP/1.1"),
        *("POST //score HTTP/1.1", "POST /score HTTP/x", "POST score HTTP/1.1"),
        *(
            "post /score HTTP/1.1",
            "POST /score",
            "",
            "\x16\x03\x01",
            "POST  /score HTTP/1.1",
        ),
        *("POST /%73core%00 HTTP/1.1", "TRACE /score HTTP/1.1", "PRI * HTTP/2.0"),
    ]
)
_EXTRA = st.sampled_from(
    [
        *[""] * 16,
        *(
            "Transfer-Encoding: chunked",
            "Transfer-Encoding: gzip",
            "Host: b",
            "No colon",
        ),
        *("Content-Length: 7", "Content-Length: " + "9" * 5000, "X: \0"),
        "Content-Type: text/plain",
    ]
)
# Headers that change nothing.
_IDLE = st.sampled_from(
    [
        *[""] * 8,
        "X: \x80",
        "Expect: 100-continue",
        "Connection: keep-alive",
        "X-A: " + "b" * 5000,
    ]
    + ["Upgrade: websocket\r\nConnection: upgrade", "Accept-Encoding: gzip"]
)


class Request(NamedTuple):
    """What is sent, and what the oracle makes of it."""

    line: str
    extra: str
    idle: str
    encoding: str
    body: Mapping[str, Any] | bytes
    cut: int | None  # bytes that are sent, if not all
    pieces: int
    over_socket: bool


_requests = st.builds(
    Request,
    line=_LINES,
    extra=_EXTRA,
    idle=_IDLE,
    encoding=st.sampled_from(sorted(TYPES)),
    body=st.one_of(bodies(), bodies(), bodies(), st.binary(max_size=60)),
    cut=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 600)),
    pieces=st.integers(1, 4),
    over_socket=st.integers(0, 49).map(lambda n: n == 0),
)


def check(given: Request) -> str:
    body = given.body
    data = body if isinstance(body, bytes) else _encoded(body, given.encoding)
    if data is None:  # msgpack cannot say it
        return core.REFUSED
    head = [given.line, "Host: a", f"Content-Type: {TYPES[given.encoding]}"]
    head += [f"Content-Length: {len(data)}", given.extra, given.idle]
    whole = "\r\n".join(part for part in head if part or part is given.line)
    sent = whole.encode("latin-1") + b"\r\n\r\n" + data
    wanted = None
    if given.line == _WELL and not given.extra and not isinstance(body, bytes):
        if given.cut is None or given.cut >= len(sent):
            wanted = expected(body, given.encoding)
    send = _over_socket if given.over_socket else _in_process
    status, told = _answered(send, sent[: given.cut], given.pieces)
    if status == 200 and told != wanted:
        raise core.Wrong(f"{told} for what must be {wanted}")
    if status != 200 and wanted is not None:
        raise core.Wrong(f"{status} {told} for what must be {wanted}")
    return core.RIGHT if status == 200 else core.REFUSED


def check_bytes(data: bytes) -> str:
    status, told = _answered(_in_process, data, 1)
    if status != 200:
        return core.REFUSED
    if data.startswith(b"POST"):
        counts = {len(v) for table in told.values() for v in table.values()}
        if len(counts) != 1:
            raise core.Wrong(f"{told}: one number for each image")
    return core.RIGHT


def expected(body: Mapping[str, Any], encoding: str) -> dict[str, Any] | None:
    """The scores, by hand; None for what must be refused."""
    names = body.get("rewards", ["red", "green"])
    images, prompts = body.get("images"), body.get("prompts")
    if not isinstance(names, list) or not isinstance(images, list):
        return None
    if not names or not all(
        isinstance(n, str) and n in ("red", "green") for n in names
    ):
        return None
    if len(set(names)) < len(names) or not images or not isinstance(prompts, list):
        return None
    if any(type(n) is not int or not 0 <= n < len(PICTURES) for n in images):
        return None
    pictures = [PICTURES[n] for n in images]
    sizes = {picture.size for picture in pictures}
    size = next(iter(sizes))
    if len(sizes) > 1 or size is None or size[0] * size[1] * len(images) > 1 << 12:
        return None
    if len(prompts) != len(images) or not all(_is_prompt(p, encoding) for p in prompts):
        return None
    texts = [p if isinstance(p, str) else p["text"] for p in prompts]
    made: dict[str, Any] = {}
    for place, name in enumerate(("red", "green")):
        if name in names:
            column = [picture.colour[place] / 255 for picture in pictures]
            made[name] = {name: np.round(column, 5).tolist()}
    if "red" in made:
        made["red"]["texts"] = [float(len(text)) for text in texts]
    return made


def _is_prompt(value: Any, encoding: str) -> bool:
    if isinstance(value, str):
        return _is_plain(value, encoding)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return False
    return (
        isinstance(value.get("metadata", {}), dict)
        and isinstance(value.get("index", 0), int)
        and _is_plain({k: v for k, v in value.items() if k in ("text", "metadata")}, "")
        and (encoding == "msgpack" or _is_json(value))
    )


def _is_plain(value: Any, encoding: str) -> bool:
    """Whether no text in it has half of a letter."""
    return re.search("[\ud800-\udfff]", _all_texts(value)) is None


def _all_texts(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "".join(_all_texts(one) for pair in value.items() for one in pair)
    return "".join(map(_all_texts, value)) if isinstance(value, list) else ""


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
        return True
    except ValueError:
        return False


def _with_files(body: Mapping[str, Any]) -> dict[str, Any]:
    images = body.get("images")
    if not isinstance(images, list):
        return dict(body)
    known = range(len(PICTURES))
    files = [PICTURES[n].data if type(n) is int and n in known else n for n in images]
    return dict(body) | {"images": files}


def _encoded(body: Mapping[str, Any], encoding: str) -> bytes | None:
    try:
        if encoding == "msgpack":
            return msgpack.packb(_with_files(body), unicode_errors="surrogatepass")
        return json.dumps(_with_files(body), default=_base64).encode()
    except OverflowError:
        return None


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _answered(send: Any, data: bytes, pieces: int) -> tuple[int, Any]:
    """Status and what was told, 0 for none; Wrong for an answer that is none."""
    step = max(1, -(-len(data) // pieces))
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        raw = send([data[n : n + step] for n in range(0, len(data), step)])
    if printed.getvalue():
        raise core.Wrong(f"prints {printed.getvalue()}")
    while raw.startswith(b"HTTP/1.1 100 "):
        raw = raw.partition(b"\r\n\r\n")[2]
    if not raw:
        return 0, None
    fake = mock.Mock(makefile=lambda *_: io.BytesIO(raw))
    method = "HEAD" if data.startswith(b"HEAD ") else "GET"
    response = http.client.HTTPResponse(fake, method=method)
    response.begin()
    body, kind = response.read(), response.headers["Content-Type"]
    if method == "HEAD":
        return response.status, {}
    told = msgpack.unpackb(body) if kind == TYPES["msgpack"] else json.loads(body)
    if response.status == 200:
        return 200, _rounded(told.get("rewards", {}))
    line = told.get("error") if list(told) == ["error"] else None
    if not isinstance(line, str) or not line or "\n" in line or len(line) > 1000:
        raise core.Wrong(f"status {response.status} with {told}")
    if response.status >= 500 or not 400 <= response.status:
        raise core.Wrong(f"status {response.status}: {line}")
    return response.status, line


def _rounded(rewards: Any) -> Any:
    if not isinstance(rewards, dict):
        return rewards
    return {
        name: {key: np.round(values, 5).tolist() for key, values in table.items()}
        for name, table in rewards.items()
    }


class Transport(asyncio.Transport):
    """Remembers what is written; closes at once."""

    def __init__(self, protocol: Connection):
        super().__init__()
        self.written, self.closed = bytearray(), asyncio.Event()
        self._protocol = protocol

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


@functools.cache
def _server() -> RewardServer:
    server = RewardServer(("127.0.0.1", 0), limits=LIMITS)
    server.load({"red": red, "green": green})
    server.start()
    return server


@functools.cache
def _apart() -> tuple[asyncio.AbstractEventLoop, uvicorn.Server]:
    """A loop of this thread, and a server that listens nowhere."""
    server = RewardServer(("127.0.0.1", 0), limits=LIMITS)
    server.load({"red": red, "green": green})
    server._socket.close()
    server._server.config.load()
    headers = server._server.config.encoded_headers
    server._server.server_state.default_headers = headers
    return asyncio.new_event_loop(), server._server


def _in_process(pieces: list[bytes]) -> bytes:
    loop, server = _apart()

    async def talk() -> bytes:
        connection = Connection(
            server.config, server.server_state, {}, _loop=loop, limits=LIMITS
        )
        transport = Transport(connection)
        connection.connection_made(transport)
        for piece in pieces:
            if not transport.is_closing():
                connection.data_received(piece)
                await asyncio.sleep(0)
        if not transport.is_closing() and not connection.eof_received():
            transport.close()
        await transport.closed.wait()
        for task in list(server.server_state.tasks):
            await asyncio.wait([task])
        await asyncio.sleep(0)
        return bytes(transport.written)

    return loop.run_until_complete(talk())


def _over_socket(pieces: list[bytes]) -> bytes:
    where = ("127.0.0.1", _server().server_port)
    with socket.create_connection(where, 10) as connection:
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").read()
    return b""


def surface() -> core.Surface:
    body = {"images": _GOOD[:2], "prompts": ["a", {"text": "b", "metadata": {"c": 1}}]}
    seeds = [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"]
    for encoding, kind in TYPES.items():
        data = _encoded(body, encoding) or b""
        head = f"{_WELL}\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: "
        seeds.append(f"{head}{len(data)}\r\n\r\n".encode() + data)
    return core.Surface("server_requests", _requests, check, seeds, check_bytes)
