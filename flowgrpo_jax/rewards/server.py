"""A reward server: `python -m flowgrpo_jax.rewards.server --rewards=geneval,ocr`.

    GET  /health   whether it is ready; needs no token
    GET  /rewards  the rewards it has
    POST /score    {"rewards": [...], "images": [...], "prompts": [...]}
                   -> {"rewards": {name: {measurement: [a number per image]}}}

Bodies are JSON (images in base64) or msgpack; see `wire`. Every reward has one thread,
so several clients may send requests at the same time. The server listens on this
machine's own address only, unless a token protects it. For TLS put it behind a proxy.
"""

import argparse
import ast
import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.registry import Combined, Reward
from flowgrpo_jax.rewards.scoring import Scorer
from flowgrpo_jax.rewards.service.limits import Limits

LOOPBACK = ("127.0.0.1", "::1", "localhost")


_DEFAULT = Limits()


class RewardServer:
    """Answers at once, and serves rewards after `load`, which may follow `start`.

    It runs on a thread that does not keep the process alive. OSError for an address
    that cannot be bound, UserError without the packages of the extra `server`.
    """

    def __init__(
        self, address: tuple[str, int], token: str = "", limits: Limits = _DEFAULT
    ):
        try:
            import uvicorn

            from flowgrpo_jax.rewards.service.connections import Connection
            from flowgrpo_jax.rewards.service.routes import Routes
        except ImportError as error:
            raise UserError(
                f"rewards.server: {error.name} is missing: pip install "
                "'flowgrpo_jax[server]'"
            ) from error
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server(address, family=family, backlog=256)
        self.server_port: int = self._socket.getsockname()[1]
        self._limits, self._routes = limits, Routes(token, limits)
        config = uvicorn.Config(
            self._routes.app,
            http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]
            loop="asyncio",
            ws="none",
            lifespan="off",
            headers=[("connection", "close")],
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=limits.grace,  # type: ignore[arg-type]
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True
        )

    def load(self, rewards: Mapping[str, Reward]) -> None:
        """Makes the server ready, with these rewards."""
        self._routes.scorers = {
            name: Scorer(Combined({name: reward}, {name: 1.0}), self._limits.deadline)
            for name, reward in rewards.items()
        }

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes no more requests, and gives running ones `Limits.grace` seconds."""
        self._server.should_exit = True
        self._thread.join(self._limits.grace + 1.5)

    def __enter__(self) -> "RewardServer":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def make_rewards(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Reward]:
    """The rewards of these names; UserError for the same faults as in a run."""
    context = registry.Context(options=options)
    return {name: registry.make(name, context) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests that have begun.

    A second signal ends the process at once.
    """
    flags = _flags(arguments)
    _give_memory_back()
    server = _server(flags)
    ends: list[UserError | None] = []  # why the server ends; None for a signal

    def load() -> None:
        try:
            server.load(make_rewards(flags.rewards.split(","), flags.reward_options))
            print(f"ready: {flags.rewards}", file=sys.stderr, flush=True)
        except UserError as error:
            ends.append(error)
        except BaseException as error:  # creating a reward may raise anything
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            ends.append(UserError(f"--rewards: {flags.rewards}: {text}"))

    def stop(number: int, _: Any) -> None:
        if None in ends:
            os._exit(128 + number)
        ends.append(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    where = f"http://{host}:{server.server_port}"
    print(f"rewards {flags.rewards} on {where}", file=sys.stderr, flush=True)
    threading.Thread(target=load, daemon=True).start()
    with server:
        while not ends:
            time.sleep(0.1)
    if ends[0] is not None:
        raise ends[0]
    return 0


def _give_memory_back() -> None:
    """Makes freed memory go back to the system.

    By default glibc keeps blocks of up to 32 MB in a heap of each thread (mallopt(3),
    M_MMAP_THRESHOLD).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def _server(flags: argparse.Namespace) -> RewardServer:
    """The server that the flags describe; UserError for wrong flags."""
    token = os.environ.get(flags.token_env, "") if flags.token_env else ""
    if flags.token_env and not token:
        raise UserError(f"--token_env: {flags.token_env}: this variable is empty")
    if flags.host not in LOOPBACK and not token:
        raise UserError(
            f"--host: {flags.host}: without --token_env anyone could use it: give one"
        )
    if not 0 <= flags.port < 1 << 16:
        raise UserError(f"--port: {flags.port}: must be in [0, 65535]")
    limits = {}
    for name in ("bytes", "pixels", "requests", "connections"):
        limits[name] = getattr(flags, f"max_{name}")
        if limits[name] < 1:
            raise UserError(f"--max_{name}: {limits[name]}: must be at least 1")
    try:
        return RewardServer(
            (flags.host, flags.port),
            token,
            Limits(
                body=limits["bytes"],
                bodies=max(limits["bytes"], Limits.bodies),
                pixels=limits["pixels"],
                requests=limits["requests"],
                connections=limits["connections"],
            ),
        )
    except socket.gaierror as error:
        raise UserError(f"--host: {flags.host}: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"--port: {flags.port}: {error.strerror or error}") from error


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flowgrpo_jax.rewards.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rewards", required=True, help="names of the rewards, separated by commas")
    add(
        "--reward_options",
        type=_options,
        default={},
        help="options of the rewards: {name: {option: value}}",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but this machine's own needs --token_env",
    )
    add("--port", type=int, default=18085, help="port to listen on; 0 takes a free one")
    add(
        "--token_env",
        default="",
        help="environment variable that holds the bearer token",
    )
    add(
        "--max_bytes", type=int, default=Limits.body, help="the most bytes of a request"
    )
    add(
        "--max_pixels",
        type=int,
        default=Limits.pixels,
        help="the most pixels that are scored at once",
    )
    add(
        "--max_requests",
        type=int,
        default=Limits.requests,
        help="the most requests that are handled at once",
    )
    add(
        "--max_connections",
        type=int,
        default=Limits.connections,
        help="the most open connections",
    )
    return parser.parse_args(arguments)


def _options(text: str) -> dict[str, dict[str, Any]]:
    try:
        options = ast.literal_eval(text)  # literals only, as in --config.reward_options
        return {str(name): dict(values) for name, values in options.items()}
    except (
        *(ValueError, SyntaxError, AttributeError, TypeError),
        *(RecursionError, MemoryError),
    ) as error:
        raise argparse.ArgumentTypeError(f"{text}: must be a dict of dicts") from error


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stderr.flush()
    os._exit(code)  # does not wait for a reward that hangs
