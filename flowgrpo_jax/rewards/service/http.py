"""HTTP requests of a reward: a few attempts, growing pauses, one deadline for all."""

import contextlib
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flowgrpo_jax.errors import UserError

MAX_ANSWER = 1 << 24  # bytes; an answer is a few numbers, or some words
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; every pause is twice the last
_PLACE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:]+)(:[0-9]+)?")  # host and port
_GARBAGE = (ValueError, RecursionError)
_LATER = (408, 425, 429, 500, 502, 503, 504)  # may be different the next time


class _Refused(Exception):
    """The answer will be the same the next time."""


class _NotReady(Exception):
    """The server is there and asks to wait."""


@dataclass(frozen=True)
class Endpoint:
    """Where a reward asks for its scores, and how patiently.

    Args:
      name: the reward, for the line that tells of a failure.
      url: http:// or https://, a path in front of all requests if it has one.
      token: sent as a bearer token if there is one.
      timeout: seconds for a connection, and between two pieces of an answer.
      retries: attempts after the first one.

    UserError for what cannot be, and for a url with a secret in it: it would be printed
    and kept with the config.
    """

    name: str
    url: str
    token: str = ""
    timeout: float = 120.0
    retries: int = 5

    def __post_init__(self):
        check_url(self.name, self.url)
        check_positive(self.name, timeout=self.timeout)
        check_whole(self.name, 0, retries=self.retries)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        content_type: str,
        read: Callable[[bytes], Any],
        until: float,
    ) -> Any:
        """What `read` makes of the answer, which must come until then (monotonic).

        Tried again: no connection, a status that may pass, an answer that `read`
        refuses by ValueError. A server that is not ready (503) is asked until the end.
        UserError that names reward and url when nothing more can be tried.
        """
        pause, left = _FIRST_PAUSE, self.retries
        while True:
            try:
                return read(self._once(method, path, body, content_type, until))
            except _Refused as error:
                raise self._failure(str(error)) from error
            except _NotReady as error:
                reason = str(error)
            except (OSError, http.client.HTTPException, *_GARBAGE) as error:
                reason = str(error) or type(error).__name__
                left -= 1
            if left < 0:
                raise self._failure(f"{reason}; tried {self.retries + 1} times")
            if time.monotonic() + pause > until:
                raise self._failure(f"{reason}; the deadline is over")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _failure(self, reason: str) -> UserError:
        line = printable(" ".join(reason.split()))[:300]
        return UserError(f"reward.{self.name}: {self.url}: {line}")

    def _once(self, method, path, body, content_type, until) -> bytes:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(
            parts.hostname or "", parts.port, timeout=_left(until, self.timeout)
        )
        headers = {"Content-Type": content_type, "Connection": "close"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            connection.connect()
            with _cut_off(connection.sock, until):
                try:
                    target = parts.path.rstrip("/") + path
                    connection.request(method, target, body, headers)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it may have answered before it had read everything
                response = connection.getresponse()
                data = _read(response)
        finally:
            connection.close()
        if response.status == 200:
            return data
        reason = f"status {response.status}: {data[:300].decode(errors='replace')}"
        if response.status == 503:
            raise _NotReady(reason)
        raise OSError(reason) if response.status in _LATER else _Refused(reason)


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body; `_Refused` if it is larger than any answer."""
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER:
            raise _Refused(f"an answer of more than {MAX_ANSWER} bytes")
    return b"".join(pieces)


@contextlib.contextmanager
def _cut_off(connected: Any, until: float) -> Iterator[None]:
    """Within it the connection of that socket ends then: a time-out of the socket is of
    every byte, and a server may drip its headers as well as its body."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, until - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _left(until: float, most: float) -> float:
    """Seconds that may still be waited; TimeoutError if there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return min(left, most)


def token_of(name: str, token_env: str) -> str:
    """The token in that environment variable, "" for none; UserError if it is unset."""
    token = os.environ.get(token_env, "") if token_env else ""
    where = f"reward.{name}: token_env: {token_env}"
    if token_env and not token:
        raise UserError(f"{where}: this environment variable is empty")
    if not (token.isascii() and token.isprintable()):  # never shown, by nobody
        raise UserError(f"{where}: must hold printable ASCII letters only")
    return token


def printable(text: str) -> str:
    """Foreign text for a terminal: its control characters as escapes."""
    return "".join(
        letter
        if letter.isprintable()
        else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )


def check_positive(name: str, **options: float) -> None:
    """UserError for options of a reward that are no positive numbers."""
    for key, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < 1e9):
            raise UserError(
                f"reward_options.{name}.{key}: {value!r}: must be a positive number"
            )


def check_whole(name: str, least: int, **options: int) -> None:
    """UserError for options of a reward that are no whole numbers from `least` on."""
    for key, value in options.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if not (number and least <= value < 1e9):
            raise UserError(
                f"reward_options.{name}.{key}: {value!r}: must be a whole number, at "
                f"least {least}"
            )


def check_url(name: str, url: Any) -> None:
    """UserError for what is no url of a server, or holds a secret."""
    if line := _wrong_url(url):
        raise UserError(f"reward.{name}: {line}")


def _wrong_url(url: Any) -> str:
    """What is wrong with it, "" if nothing is. A secret in it is not repeated."""
    if not isinstance(url, str):
        return f"{url!r}: must be a text, http://host:port or https://"
    if set(url) & set("@?#"):
        return "url: use token_env: no password, ? or # belongs in it"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        named = host and _PLACE.fullmatch(parts.netloc) and parts.port != 0
        if parts.scheme in ("http", "https") and named:
            host.encode("idna")  # as the socket will
            if url.isprintable() and not set(url) & set(" \\"):
                return ""
    except ValueError:  # brackets that do not match, a port that is none
        pass
    return f"{printable(url)}: must be http://host:port or https://"
