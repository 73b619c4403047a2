"""Connections of the reward server: uvicorn's, with a deadline for every part of them.

uvicorn limits the time between two requests. It limits neither the time that a request
line and headers may drip in, nor the number of connections.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowgrpo_jax.rewards.service.limits import Limits

_LAST_CHANCE = 2.0  # seconds for a body that is coming when the server is stopped


class Connection(H11Protocol):
    """A connection for one request.

    Request line and headers must arrive within `limits.head` seconds, and the client
    must take its answer within as many. When there are more than `limits.connections`,
    the oldest whose request is not complete yet is cut off: idle and dripping clients
    make room for those that ask.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._began = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._limits.head, self._late)
        there = [
            one
            for one in self.connections
            if isinstance(one, Connection) and not one.transport.is_closing()
        ]
        if len(there) > self._limits.connections:
            idle = [one for one in there if not one._is_asked()]  # self is among them
            min(idle, key=lambda one: one._began).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()  # the head is there; whoever reads the body has a deadline

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more, but may well read its answer."""
        if self.cycle is None:
            return False
        self.cycle.more_body = False  # shorter than it said, unless it is all there
        self.cycle.message_event.set()
        return True

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._cancel()
        self._timer = self.loop.call_later(self._limits.head, self.transport.abort)

    def shutdown(self) -> None:
        """Requests that are being answered go on, and a body that is on its way may
        still arrive. All other connections end."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        elif self.cycle.more_body:
            self.loop.call_later(_LAST_CHANCE, self._give_up)

    def _give_up(self) -> None:
        if not self._is_asked():
            self.transport.abort()

    def _is_asked(self) -> bool:
        """Whether the whole request has arrived and is not answered yet."""
        cycle = self.cycle
        return bool(cycle and not cycle.more_body and not cycle.response_complete)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        self._refuse(408, f"no request within {self._limits.head:g} seconds")

    def _refuse(self, status: int, line: str) -> None:
        """Answer what is not a complete request, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            # A broken body: the request gets no other answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._cancel()
        self._timer = self.loop.call_later(self._limits.head, self.transport.abort)
        body = json.dumps({"error": line}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(
            status_code=status, headers=headers, reason=STATUS_PHRASES[status]
        )
        try:
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun
            self.transport.abort()
            return
        self.transport.close()
