"""How much a reward server takes on at once, and which requests wait or are refused."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes. With the defaults one of small rewards stays below 600 MB.

    A process with JAX needs 220 MB. Added to that are `bodies`, the one body that is
    being unpacked (at most seven times its bytes), and about 40 bytes a pixel for
    float32 images and what a reward in numpy makes of them.
    """

    body: int = 24 << 20  # bytes of a request
    bodies: int = 48 << 20  # bytes of all requests that are there or coming
    values: int = 1 << 16  # names, numbers, texts and lists of a request
    side: int = 1 << 14  # pixels: width and height of an image
    pixels: int = 1 << 22  # of all images that are being scored
    requests: int = 64  # whose body is there
    connections: int = 512
    head: float = 10.0  # seconds to send the request line and the headers
    seconds: float = 60.0  # to send the body
    deadline: float = 600.0  # seconds to score a request
    grace: float = 7.0  # seconds for what was begun when the server is stopped


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: int, line: str, **headers: str):
        super().__init__(line)
        self.status = status
        self.headers = headers | ({"Retry-After": "1"} if status == 503 else {})


class Pixels:
    """Pixels that may be in work at once: a request waits until its own are free."""

    def __init__(self, most: int):
        self._free = most
        self._line, self._changed = asyncio.Lock(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Hold `count` of them, at most as many as there are in all."""
        async with self._line:  # a large request is not passed by small ones for ever
            while count > self._free:
                self._changed.clear()
                await self._changed.wait()
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            self._changed.set()


class Bodies:
    """Bytes of request bodies that may be in memory at once.

    When there are more, the oldest body that is still arriving is given up: slow
    clients do not shut others out.
    """

    def __init__(self, most: int):
        self._most, self._held = most, 0
        self._coming: dict[asyncio.Timeout, None] = {}  # oldest first

    async def read(self, pieces: AsyncIterable[bytes], seconds: float) -> bytearray:
        """The whole body, counted until its bytes are released; Refused if it is too slow."""
        body = bytearray()
        until = asyncio.timeout(seconds)
        self._coming[until] = None
        try:
            async with until:
                async for piece in pieces:
                    body += piece
                    self._add(len(piece))
        except TimeoutError as error:
            self.release(len(body))
            if until in self._coming:
                raise Refused(408, f"body: not there in {seconds:g} seconds") from error
            raise Refused(503, "busy: slower than the other bodies") from error
        except BaseException:
            self.release(len(body))
            raise
        finally:
            self._coming.pop(until, None)
        return body

    def release(self, count: int) -> None:
        self._held -= count

    def _add(self, count: int) -> None:
        self._held += count
        if self._held > self._most and self._coming:
            oldest = next(iter(self._coming))
            del self._coming[oldest]
            oldest.reschedule(asyncio.get_running_loop().time())
