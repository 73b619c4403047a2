"""HTTP requests of a reward: a few attempts, growing pauses, one deadline for all."""

import functools
import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
import tenacity
from anyio.from_thread import start_blocking_portal

from flowgrpo_jax.errors import UserError

MAX_ANSWER = 1 << 24  # bytes; an answer is a few numbers, or some words
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; every pause is twice the last
_PLACE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:]+)(:[0-9]+)?")  # host and port
_LATER = (408, 425, 429, 500, 502, 503, 504)  # may be different the next time


class _Refused(Exception):
    """The answer will be the same the next time."""


class _NotReady(Exception):
    """The server is there and asks to wait."""


# Worth another attempt: no connection, none in time, a status that may pass, garbage.
_PASSING = (_NotReady, OSError, httpx2.TransportError, ValueError, RecursionError)


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
        failed, is_late = 0, tenacity.stop_before_delay(until - time.monotonic())

        def is_last(state: tenacity.RetryCallState) -> bool:
            nonlocal failed
            assert state.outcome is not None
            failed += not isinstance(state.outcome.exception(), _NotReady)
            return failed > self.retries or is_late(state)

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PASSING),
            wait=tenacity.wait_exponential(_FIRST_PAUSE, _LONGEST_PAUSE),
            stop=is_last,
            reraise=True,
        )
        try:
            return attempts(
                lambda: read(self._once(method, path, body, content_type, until))
            )
        except _Refused as error:
            raise self._failure(str(error)) from error
        except _PASSING as error:
            tried = f"tried {self.retries + 1} times"
            why = tried if failed > self.retries else "the deadline is over"
            raise self._failure(f"{_reason(error)}; {why}") from error

    def _failure(self, reason: str) -> UserError:
        line = printable(" ".join(reason.split()))[:300]
        return UserError(f"reward.{self.name}: {self.url}: {line}")

    def _once(self, method, path, body, content_type, until) -> bytes:
        # An event loop of its own, in a thread of its own: there the deadline ends the
        # exchange wherever it is. A client without one has time-outs of every read
        # alone, and a server may drip its headers as well as its body.
        with start_blocking_portal() as portal:
            status, data = portal.call(
                self._exchange, method, path, body, content_type, until
            )
        if status == 200:
            return data
        reason = f"status {status}: {data[:300].decode(errors='replace')}"
        if status == 503:
            raise _NotReady(reason)
        raise OSError(reason) if status in _LATER else _Refused(reason)

    async def _exchange(self, method, path, body, content_type, until):
        """Status and body of one answer; `_Refused` if it is larger than any answer."""
        headers = {"Content-Type": content_type, "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        url, data = self.url.rstrip("/") + path, bytearray()
        with anyio.fail_after(max(0.0, until - time.monotonic())):
            async with (
                # No proxy and no password of the environment: the url says it all.
                httpx2.AsyncClient(
                    verify=_authorities(), trust_env=False, timeout=self.timeout
                ) as client,
                client.stream(method, url, content=body, headers=headers) as response,
            ):
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > MAX_ANSWER:
                        raise _Refused(f"an answer of more than {MAX_ANSWER} bytes")
        return response.status_code, bytes(data)


def _reason(error: BaseException) -> str:
    """Why an attempt failed, in the words of the system where it has some."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx2.ConnectError):
        # "Connection refused" is the first cause of "all connection attempts failed".
        while inner := error.__cause__ or error.__context__:
            error = inner
        if isinstance(error, BaseExceptionGroup):  # one for each address of the host
            error = error.exceptions[0]
        number = error.errno if isinstance(error, OSError) else None
        if number is not None and number > 0:  # those of name servers are below 0
            return os.strerror(number)
    return str(error) or type(error).__name__


@functools.cache
def _authorities() -> ssl.SSLContext:
    """Those that this machine trusts; reading them takes longer than a request."""
    return ssl.create_default_context()


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
