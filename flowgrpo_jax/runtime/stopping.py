"""How a process ends: signals are never lost, and no thread can keep it from ending.

SIGTERM (a preemption, `kill`) and SIGINT (Ctrl-C) end the process at once, with one
line and exit code 143 or 130, as long as it has nothing to save. Within a `GracefulStop` the
first signal only requests a stop, and the second one ends the process.

Python runs a handler when its main thread next runs Python code, so not while XLA
compiles; and what a handler raises inside a callback of JAX is lost. So the handlers do
nothing. The interpreter also writes the number of each signal to a pipe
(`signal.set_wakeup_fd`), and a thread reads the pipe and acts.

Only the standard library is imported here: `flowgrpo_jax/__init__.py` calls `install`
before a command spends seconds on importing jax.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_pipe: int | None = None  # its write end, once the thread reads the other end
_current: "GracefulStop | None" = None
_is_command = False
_last_signal = 0  # the last one that this process received


class Stopped(Exception):
    """Raised by `GracefulStop.check` once a signal has requested a stop."""


def nothing(status: int, line: str) -> None:
    """No last words."""


# What is told of an end to the other processes of a run, if there are any.
last_words: Callable[[int, str], None] = nothing


def install() -> None:
    """Declares this process a command: from here on a signal ends it at once."""
    global _is_command
    _is_command = True
    _listen()


def reinstall() -> None:
    """Sets the handlers again after a library (libtpu) has installed its own."""
    if _is_command:
        _listen()


class GracefulStop:
    """Within it the first signal only sets `requested`, to its number.

    While `unsaved` is False a command has nothing to save, and the first signal ends it
    at once. In a process that is no command (a notebook) the second signal goes to the
    previous handlers; they are set again at the end.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.unsaved = True
        self._before: dict[int, Any] = {}
        self._heard = 0

    def check(self) -> None:
        """Raises Stopped if a signal has requested a stop."""
        if self.requested:
            raise Stopped

    def __enter__(self) -> "GracefulStop":
        global _current
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        _current = self
        _listen()
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int) -> None:
        """Counts a signal; runs in the main thread of a process that is no command."""
        self._heard += 1
        if self._heard > 1:
            self._put_back()
            signal.raise_signal(number)


def is_requested() -> bool:
    """Whether a signal has requested the stop of a run that is under way."""
    return _current is not None and bool(_current.requested)


def status() -> int:
    """The exit code after a signal, as shells have it."""
    return 128 + (_last_signal or signal.SIGTERM)


def finish(status: int, seconds: float = 1.0) -> NoReturn:
    """Ends a command as Python does, but after at most `seconds`.

    Results are on disk by now. Threads of a user's reward or of a pool could keep the
    process alive, or those of orbax, which wait 300 s after a save that failed.
    """

    def overdue() -> None:
        time.sleep(seconds)
        leave(status)

    if _is_command:
        threading.Thread(target=overdue, daemon=True).start()
    sys.exit(status)


def leave(status: int, line: str = "") -> NoReturn:
    """Ends the process now, whatever its threads do, and its worker processes."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            _within(1.0, stream.flush)
    if line:
        _within(1.0, lambda: _say(line))
    _within(5.0, lambda: last_words(status, line))
    with contextlib.suppress(Exception):
        _end_workers()  # on no thread: none starts in a shutdown from Python 3.12 on
    os._exit(status)


def _listen() -> None:
    """Sets the handlers and the pipe, and starts the one thread that reads it."""
    global _pipe
    reading = None
    if _pipe is None:
        reading, _pipe = os.pipe()
        os.set_blocking(_pipe, False)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    if (
        reading is not None
    ):  # last, since a signal could interrupt the wait for the thread
        threading.Thread(
            target=_watch, args=(reading,), name="signals", daemon=True
        ).start()


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Does nothing, unless an event loop has replaced our pipe by its own."""
    del frame
    assert _pipe is not None
    current_pipe = signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    if current_pipe != _pipe:
        signal.set_wakeup_fd(current_pipe, warn_on_full_buffer=False)
        os.write(_pipe, bytes([number]))
    if _current is not None and not _is_command:
        _current._hear(number)


def _watch(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 64):
            # A server or a user's code may have handlers of its own by now.
            if number in SIGNALS and signal.getsignal(number) is _on_signal:
                _received(number)


def _received(number: int) -> None:
    global _last_signal
    _last_signal = number
    stop, name = _current, signal.Signals(number).name
    if stop is None or (_is_command and (stop.requested or not stop.unsaved)):
        leave(128 + number, f"{name}: stopped")
    if stop.requested:
        return
    stop.requested = number
    _within(1.0, lambda: _say(f"{name}: saving, then stopping (again: at once)"))


def _say(line: str) -> None:
    """Writes to stderr; not by print, which the signal may have interrupted."""
    start = "\n" if os.isatty(2) else ""  # on a new line below the ^C
    os.write(2, f"{start}{line}\n".encode())


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Calls, and waits no longer than `seconds`: whoever reads our output may hang."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread starts while Python shuts down
        thread.start()
        thread.join(seconds)


def _end_workers() -> None:
    """Ends workers of multiprocessing: `os._exit` leaves them, with our output open."""
    loaded = sys.modules.get("multiprocessing.process")
    workers = loaded.active_children() if loaded else []
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + 0.5
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        worker.kill()


def _block_signals() -> None:
    """Blocks signals until the forked child has its own handlers.

    Otherwise a signal for the child (a pool ends its workers with SIGTERM) would go to
    our pipe, and the parent would take it for its own.
    """
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _reset_child() -> None:
    """Default handlers for a forked process, such as a worker: it has no such thread."""
    global _pipe, _current, _is_command
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)
        _pipe, _current, _is_command = None, None, False
    _unblock_signals()


_forking = threading.local()
os.register_at_fork(
    before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_reset_child
)
