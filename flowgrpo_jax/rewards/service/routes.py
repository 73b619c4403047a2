"""The three routes of the reward server; whatever is refused is answered by one line."""

import asyncio
import hmac
import math
import reprlib
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.scoring import Batch, RewardFailure, Scorer
from flowgrpo_jax.rewards.service import wire
from flowgrpo_jax.rewards.service.limits import Bodies, Limits, Pixels, Refused

_ENCODINGS = {content_type: name for name, content_type in wire.TYPES.items()}
_LINGER, _PAUSE = 30.0, 2.0  # seconds for the rest of a refused body, and without any
_PATHS = "/health, /rewards, /score"


class Routes:
    """The application; `scorers` is None until the rewards are there."""

    def __init__(self, token: str, limits: Limits):
        self.scorers: dict[str, Scorer] | None = None
        self._token, self._limits = token, limits
        self._bodies, self._pixels = Bodies(limits.bodies), Pixels(limits.pixels)
        self._unpacking = asyncio.Lock()
        self._asked = 0  # requests whose body is there
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/rewards", self._rewards),
                Route("/score", self._score, methods=["POST"]),
            ],
            exception_handlers={
                Refused: _refusal,
                HTTPException: _no_route,
                ClientDisconnect: _gone,
                Exception: _fault,
            },
        )
        self.app.router.redirect_slashes = False

    async def _health(self, request: Request) -> Response:
        self._ready()
        return _Answer({"status": "ready"})

    async def _rewards(self, request: Request) -> Response:
        self._check_token(request)
        names = list(self._ready())
        return _Answer({"rewards": names, "max_pixels": self._limits.pixels})

    async def _score(self, request: Request) -> Response:
        self._check_token(request)
        encoding, length = self._check_headers(request)
        body = await self._bodies.read(_whole(request, length), self._limits.seconds)
        if self._asked >= self._limits.requests:
            self._bodies.release(length)
            raise Refused(503, f"busy with {self._limits.requests} requests")
        self._asked += 1
        try:
            scorers = self._ready()
            async with self._unpacking:  # unpacking takes most memory: one at a time
                opened = await _in_thread(self._unpack, body, encoding, scorers)
            body.clear()  # its files were copied out of it
            names, files, prompts = opened
            async with self._pixels.taken(files.pixels):
                answer = await _in_thread(_scores, names, files, prompts)
        except asyncio.CancelledError as error:  # the time of grace is over
            raise Refused(503, "the server is being stopped") from error
        finally:
            self._asked -= 1
            self._bodies.release(length)
        return _Answer(answer, encoding)

    def _ready(self) -> dict[str, Scorer]:
        if self.scorers is None:
            raise Refused(503, "the rewards are being loaded")
        return self.scorers

    def _check_token(self, request: Request) -> None:
        wanted = f"Bearer {self._token}".encode()
        given = request.headers.get("Authorization", "").encode("utf-8", "replace")
        if self._token and not hmac.compare_digest(given, wanted):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refused(
                401, "a bearer token is needed, and this is not it", **challenge
            )

    def _check_headers(self, request: Request) -> tuple[str, int]:
        """Encoding and length of the body; Refused where the headers do not allow one."""
        given = request.headers.get("Content-Length")
        if given is None or "Transfer-Encoding" in request.headers:
            raise Refused(411, "Content-Length: must be there, a number of bytes")
        length, most = int(given), self._limits.body  # h11 takes up to 20 digits
        if length > most:
            raise Refused(413, f"a body of {length} bytes: at most {most}")
        kinds = request.headers.getlist("Content-Type")
        kind = ", ".join(kinds).partition(";")[0].strip().lower()  # two are none
        if kind not in _ENCODINGS:
            raise Refused(415, f"Content-Type: must be {' or '.join(_ENCODINGS)}")
        return _ENCODINGS[kind], length

    def _unpack(
        self, data: bytearray, encoding: str, scorers: dict[str, Scorer]
    ) -> tuple[dict[str, Scorer], wire.Files, list[wire.Prompt]]:
        """The rewards, images and prompts of a body; Refused if any of them is wrong."""
        limits = self._limits
        try:
            body = wire.load(data, encoding, limits.values)
            if not isinstance(body, dict):
                raise ValueError("body: must be an object")
            names = _chosen(body.get("rewards", list(scorers)), scorers)
            files = wire.files_from(body.get("images"), limits.pixels, limits.side)
            return names, files, wire.prompts_from(body.get("prompts"), len(files.data))
        except wire.TooLarge as error:
            raise Refused(413, str(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error


def _chosen(names: Any, scorers: Mapping[str, Scorer]) -> dict[str, Scorer]:
    if not isinstance(names, list) or not names:
        raise ValueError("rewards: must be a list of names")
    chosen = {}
    for name in names:
        shown = (name if isinstance(name, str) else reprlib.repr(name))[:40]
        if not isinstance(name, str) or name not in scorers:
            raise Refused(404, f"rewards: {shown}: not among {', '.join(scorers)}")
        if name in chosen:
            raise ValueError(f"rewards: {shown}: must stand there once")
        chosen[name] = scorers[name]
    return chosen


def _scores(
    scorers: Mapping[str, Scorer], files: wire.Files, prompts: list[wire.Prompt]
) -> dict[str, Any]:
    try:
        images = wire.pixels_from(files)
    except ValueError as error:
        raise Refused(400, str(error)) from error
    begun = {name: scorer.start(images, prompts) for name, scorer in scorers.items()}
    return {"rewards": {n: _finish(scorers[n], begun[n]) for n in begun}}


def _finish(scorer: Scorer, batch: Batch) -> dict[str, list[float | None]]:
    """Name -> a number per image; null where a measurement has none (NaN)."""
    try:
        table = scorer.finish([batch])
    except RewardFailure as error:
        wrong_input = isinstance(error.__cause__, UserError)
        if error.__cause__ is not None and not wrong_input:
            traceback.print_exception(error.__cause__)
        raise Refused(400 if wrong_input else 500, str(error)) from error
    return {
        key: [value if math.isfinite(value) else None for value in column.tolist()]
        for key, column in table.items()
        if key != "avg"
    }


async def _whole(request: Request, length: int):
    """The pieces of a body; Refused if there are fewer bytes than Content-Length."""
    async for piece in request.stream():
        length -= len(piece)
        yield piece
    request.scope["body_is_read"] = True
    if length:
        raise Refused(400, "body: shorter than Content-Length")


async def _in_thread(function: Callable, *args: Any) -> Any:
    """Call it on a thread that does not keep the process alive."""
    result: Future = Future()
    threading.Thread(target=_run, args=(result, function, *args), daemon=True).start()
    try:
        return await asyncio.wrap_future(result)
    finally:
        # An exception in it holds frames, and they hold a body: neither may stay.
        del result


def _run(result: Future, function: Callable, *args: Any) -> None:
    result.set_running_or_notify_cancel()
    try:
        result.set_result(function(*args))
    except BaseException as error:
        result.set_exception(error)
        del result, args  # as above


class _Answer(Response):
    """An answer of plain values.

    A client that is still sending a body reads its answer only afterwards: the rest of
    the body is received for a while, and dropped.
    """

    def __init__(
        self,
        body: Any,
        encoding: str = "json",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ):
        data = wire.dump(body, encoding)
        super().__init__(data, status, headers, media_type=wire.TYPES[encoding])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER):
                while not scope.get("body_is_read"):
                    async with asyncio.timeout(_PAUSE):
                        message = await receive()
                    scope["body_is_read"] = not message.get("more_body")
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refusal(request: Request, error: Any) -> Response:
    return _Answer({"error": str(error)}, "json", error.status, error.headers)


async def _no_route(request: Request, error: Any) -> Response:
    allowed = (error.headers or {}).get("Allow", "")
    line = f"must be {allowed}" if allowed else f"no such path; there are {_PATHS}"
    return _Answer({"error": line}, "json", error.status_code, error.headers)


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _fault(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return _Answer({"error": "internal error"}, "json", 500)
