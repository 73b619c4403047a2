"""HTTP requests of a reward: a few attempts, growing pauses, one deadline for all."""

import http.client
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flowgrpo_jax.errors import UserError

MAX_ANSWER = 1 << 28  # bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; every pause is twice the last
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
    """

    name: str
    url: str
    token: str = ""
    timeout: float = 120.0
    retries: int = 5

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"reward.{self.name}: {self.url}: must be http://host:port or https://"
            )

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
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
                left -= 1
            if left < 0:
                raise self._failure(f"{reason}; tried {self.retries + 1} times")
            if time.monotonic() + pause > until:
                raise self._failure(f"{reason}; the deadline is over")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _failure(self, reason: str) -> UserError:
        line = " ".join(reason.split())[:300]
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
            try:
                target = parts.path.rstrip("/") + path
                connection.request(method, target, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have answered before it had read everything
            response = connection.getresponse()
            data = self._read(connection, response, until)
        finally:
            connection.close()
        if response.status == 200:
            return data
        reason = f"status {response.status}: {data[:300].decode(errors='replace')}"
        if response.status == 503:
            raise _NotReady(reason)
        raise OSError(reason) if response.status in _LATER else _Refused(reason)

    def _read(self, connection, response, until) -> bytes:
        """The body, piece by piece: a server that drips does not outlast the deadline."""
        pieces, size = [], 0
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER:
                raise _Refused(f"an answer of more than {MAX_ANSWER} bytes")
            if connection.sock is not None:
                connection.sock.settimeout(_left(until, self.timeout))
            else:
                _left(until, self.timeout)
        return b"".join(pieces)


def _left(until: float, most: float) -> float:
    """Seconds that may still be waited; TimeoutError if there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return min(left, most)


def token_of(name: str, token_env: str) -> str:
    """The token in that environment variable, "" for none; UserError if it is unset."""
    if token_env and not os.environ.get(token_env):
        raise UserError(
            f"reward.{name}: token_env: {token_env}: this environment variable is empty"
        )
    return os.environ[token_env] if token_env else ""
