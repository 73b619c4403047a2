"""A reward server: `python -m flowgrpo_jax.rewards.server --rewards=geneval,ocr`.

    GET  /health   whether it is ready; needs no token
    GET  /rewards  the rewards it has
    POST /score    {"rewards": [...], "images": [...], "prompts": [...]}
                   -> {"rewards": {name: {measurement: [a number per image]}}}

Bodies are JSON (images in base64) or msgpack, see `wire`. Every reward has one thread,
so any number of clients may ask at once. It listens on this machine only, unless a
token protects it; put it behind a proxy for TLS.
"""

import argparse
import ast
import hmac
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry, wire
from flowgrpo_jax.rewards.registry import Combined, Reward
from flowgrpo_jax.rewards.scoring import RewardFailure, Scorer

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ENCODINGS = {content_type: name for name, content_type in wire.TYPES.items()}
_METHODS = {"/health": "GET", "/rewards": "GET", "/score": "POST"}


@dataclass(frozen=True)
class Limits:
    """What a server takes on at once."""

    body: int = 256 << 20  # bytes of a request
    pixels: int = 1 << 26  # of all its images together
    requests: int = 16  # being read or scored
    seconds: float = 60.0  # to send a request
    deadline: float = 600.0  # seconds to score it


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: int, line: str, **headers: str):
        super().__init__(line)
        self.status, self.headers = status, headers


class RewardServer(ThreadingHTTPServer):
    """Serves `rewards` once they are there: `load` may be called after the start."""

    daemon_threads = False  # what was begun is finished before `server_close` returns
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], token: str = "", limits=Limits()):
        super().__init__(address, _Handler)
        self.token, self.limits = token, limits
        self.scorers: dict[str, Scorer] | None = None
        self.slots = threading.BoundedSemaphore(limits.requests)

    def load(self, rewards: Mapping[str, Reward]) -> None:
        """From now on it is ready, with these rewards."""
        self.scorers = {
            name: Scorer(Combined({name: reward}, {name: 1.0}), self.limits.deadline)
            for name, reward in rewards.items()
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is told on stderr."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()

    def score(self, body: Any) -> dict[str, Any]:
        """The answer to a request to score; Refused if it cannot be."""
        if self.scorers is None:
            raise Refused(503, "the rewards are being loaded")
        if not isinstance(body, dict):
            raise Refused(400, "body: must be an object")
        names = body.get("rewards", list(self.scorers))
        if not isinstance(names, list) or not names:
            raise Refused(400, "rewards: must be a list of names")
        unknown = [str(name)[:40] for name in names if name not in list(self.scorers)]
        if unknown:
            raise Refused(404, f"rewards: {unknown[0]}: not among {_names(self)}")
        try:
            images = wire.images_from(body.get("images"), self.limits.pixels)
            prompts = wire.prompts_from(body.get("prompts"), len(images))
        except wire.TooLarge as error:
            raise Refused(413, str(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error
        begun = {name: self.scorers[name].start(images, prompts) for name in names}
        return {"rewards": {n: self._finish(n, begun[n]) for n in begun}}

    def _finish(self, name: str, batch: Any) -> dict[str, list[float]]:
        assert self.scorers is not None
        try:
            table = self.scorers[name].finish([batch])
        except RewardFailure as error:
            wrong_input = isinstance(error.__cause__, UserError)
            if error.__cause__ is not None and not wrong_input:
                traceback.print_exception(error.__cause__)
            raise Refused(400 if wrong_input else 500, str(error)) from error
        return {key: v.tolist() for key, v in table.items() if key != "avg"}


def _names(server: RewardServer) -> str:
    return ", ".join(server.scorers or ())


class _Handler(BaseHTTPRequestHandler):
    """One request; a connection carries no second one."""

    server: RewardServer
    server_version, sys_version = "flowgrpo_jax", ""
    default_request_version = "HTTP/1.0"  # a broken request gets a status, too
    timeout = 30.0  # seconds without a byte
    _unread = 0  # bytes of a body that nobody has asked for yet

    def _answer(self) -> None:
        headers: dict[str, str] = {}
        try:
            status, body, encoding = 200, *self._route()
        except Refused as refused:
            status, headers = refused.status, refused.headers
            body, encoding = {"error": str(refused)}, "json"
        except OSError:  # the client has gone
            self.close_connection = True
            return
        except Exception:
            traceback.print_exc()
            status, body, encoding = 500, {"error": "internal error"}, "json"
        self._send(status, wire.dump(body, encoding), wire.TYPES[encoding], headers)
        self._discard()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = _answer

    def _route(self) -> tuple[Any, str]:
        """(body, encoding) of the answer."""
        self._unread = self._length() or 0
        path = self.path.partition("?")[0]
        if path not in _METHODS:
            raise Refused(404, f"no such path; there are {', '.join(_METHODS)}")
        if self.command != _METHODS[path]:
            raise Refused(405, f"must be {_METHODS[path]}", Allow=_METHODS[path])
        ready = self.server.scorers is not None
        if path == "/health":
            if not ready:
                raise Refused(503, "the rewards are being loaded")
            return {"status": "ready"}, "json"
        self._check_token()
        if path == "/rewards":
            if not ready:
                raise Refused(503, "the rewards are being loaded")
            return {"rewards": list(self.server.scorers or ())}, "json"
        encoding = self._check_headers()
        if not self.server.slots.acquire(blocking=False):
            raise Refused(503, f"busy with {self.server.limits.requests} requests")
        try:
            return self.server.score(self._body(encoding)), encoding
        finally:
            self.server.slots.release()

    def _check_token(self) -> None:
        wanted = f"Bearer {self.server.token}".encode()
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if self.server.token and not hmac.compare_digest(given, wanted):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refused(
                401, "a bearer token is needed, and this is not it", **challenge
            )

    def _length(self) -> int | None:
        given = self.headers.get("Content-Length", "")
        return int(given) if given.isascii() and given.isdigit() else None

    def _check_headers(self) -> str:
        """The encoding of the body, when all that stands before it is well."""
        length, most = self._length(), self.server.limits.body
        if length is None:
            raise Refused(411, "Content-Length: must be there, a number of bytes")
        if length > most:
            raise Refused(413, f"a body of {length} bytes: at most {most}")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _ENCODINGS:
            raise Refused(415, f"Content-Type: must be {' or '.join(_ENCODINGS)}")
        return _ENCODINGS[kind]

    def _body(self, encoding: str) -> Any:
        until = time.monotonic() + self.server.limits.seconds
        pieces = []
        while self._unread:
            piece = self.rfile.read1(min(self._unread, 1 << 20))
            if not piece or time.monotonic() > until:
                raise Refused(400, "body: shorter than Content-Length, or too slow")
            self._unread -= len(piece)
            pieces.append(piece)
        try:
            return wire.load(b"".join(pieces), encoding)
        except ValueError as error:
            raise Refused(400, str(error)) from error

    def _discard(self) -> None:
        """Take some of a body that was refused: the client reads the answer only then."""
        until = time.monotonic() + 2.0
        self.connection.settimeout(1.0)
        try:
            while self._unread > 0 and time.monotonic() < until:
                piece = self.rfile.read1(min(self._unread, 1 << 20))
                self._unread = self._unread - len(piece) if piece else 0
        except OSError:
            return

    def _send(
        self, status: int, data: bytes, kind: str, headers: Mapping[str, str]
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """What the base class refuses (a broken request line) in the same form."""
        line = json.dumps({"error": str(message or code)}).encode()
        self.close_connection = True
        self._send(code, line, wire.TYPES["json"], {})

    def log_message(self, format: str, *values: Any) -> None:
        """Successful requests are no news."""


def make_rewards(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Reward]:
    """The rewards of these names; UserError as in a run."""
    context = registry.Context(options=options)
    return {name: registry.make(name, context) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; what was begun is finished first."""
    flags = _flags(arguments)
    token = os.environ.get(flags.token_env, "") if flags.token_env else ""
    if flags.token_env and not token:
        raise UserError(f"--token_env: {flags.token_env}: this variable is empty")
    if flags.host not in LOOPBACK and not token:
        raise UserError(
            f"--host: {flags.host}: without --token_env anyone could use it: give one"
        )
    limits = Limits(flags.max_bytes, flags.max_pixels, flags.max_requests)
    try:
        server = RewardServer((flags.host, flags.port), token, limits)
    except OSError as error:
        raise UserError(f"--port: {flags.port}: {error.strerror or error}") from error
    failure: list[UserError] = []

    def load() -> None:
        try:
            server.load(make_rewards(flags.rewards.split(","), flags.reward_options))
            print(f"ready: {_names(server)}", file=sys.stderr, flush=True)
        except UserError as error:
            failure.append(error)
            server.shutdown()

    def stop(*_: Any) -> None:  # not from the thread that serves: it waits for it
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    where = f"http://{flags.host}:{server.server_port}"
    print(f"rewards {flags.rewards} on {where}", file=sys.stderr, flush=True)
    threading.Thread(target=load, daemon=True).start()
    with server:
        server.serve_forever(poll_interval=0.1)
    if failure:
        raise failure[0]
    return 0


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flowgrpo_jax.rewards.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rewards", required=True, help="names, with commas between")
    add("--reward_options", type=_options, default={}, help="{name: {option: value}}")
    add("--host", default="127.0.0.1", help="other machines need --token_env")
    add("--port", type=int, default=18085, help="0 takes a free one")
    add("--token_env", default="", help="environment variable with the bearer token")
    add("--max_bytes", type=int, default=Limits.body, help="of a request")
    add("--max_pixels", type=int, default=Limits.pixels, help="of all its images")
    add("--max_requests", type=int, default=Limits.requests, help="at once")
    return parser.parse_args(arguments)


def _options(text: str) -> dict[str, dict[str, Any]]:
    try:
        options = ast.literal_eval(text)  # as in --config.reward_options: values only
        return {str(name): dict(values) for name, values in options.items()}
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: must be a dict of dicts") from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
