"""How a process ends: by a signal, which is never lost, or by itself, which nothing holds.

SIGTERM (a preemption, `kill`) and SIGINT (Ctrl-C) end the process at once and in one
line, exit code 143 or 130, as long as it has nothing to save. Within a `GracefulStop`
the first one only asks, and the second ends.

Python runs a handler when its main thread next runs Python code, so not while XLA
compiles, and what a handler raises inside a callback of JAX is lost. So the handlers
do nothing: the interpreter also writes the number of each signal to a pipe
(`signal.set_wakeup_fd`), and a thread that reads it does what there is to do.

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

_pipe: int | None = None  # its end for writing, once the thread reads the other one
_current: "GracefulStop | None" = None
_is_command = False
_asked = 0  # the last signal that has


class Stopped(Exception):
    """Raised by `GracefulStop.check` once a signal has asked."""


def install() -> None:
    """From here on a signal ends this process, a command, at once."""
    global _is_command
    _is_command = True
    _listen()


def reinstall() -> None:
    """Take the signals back from a library that has handlers of its own (libtpu)."""
    if _is_command:
        _listen()


class GracefulStop:
    """Within it the first signal only sets `requested`, to its number.

    While `unsaved` is False a command has nothing to save and ends at the first one
    too. In a process that is no command (a notebook) the second one does what the
    handlers of before do; they are put back at the end.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.unsaved = True
        self._before: dict[int, Any] = {}
        self._heard = 0

    def check(self) -> None:
        """Raise Stopped if the process was asked to stop."""
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
        """In the main thread, of a process that is no command."""
        self._heard += 1
        if self._heard > 1:
            self._put_back()
            signal.raise_signal(number)


def status() -> int:
    """The exit code of a process that was asked to stop, as a shell has it."""
    return 128 + (_asked or signal.SIGTERM)


def finish(status: int, seconds: float = 1.0) -> NoReturn:
    """End a command as Python does, but after `seconds` whatever still holds it.

    Results are on disk by now. What may hold it: threads of a user's reward, pools, or
    those of orbax, which wait 300 s after a save that failed.
    """

    def overdue() -> None:
        time.sleep(seconds)
        leave(status)

    if _is_command:
        threading.Thread(target=overdue, daemon=True).start()
    sys.exit(status)


def leave(status: int, line: str = "") -> NoReturn:
    """End the process now, whatever its threads do; worker processes end with it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            _within(1.0, stream.flush)
    if line:
        _within(1.0, lambda: _say(line))
    with contextlib.suppress(Exception):
        _end_workers()  # not on a thread: from Python 3.12 on none begins in a shutdown
    os._exit(status)


def _listen() -> None:
    """Handlers on this module's pipe, and the one thread that reads it."""
    global _pipe
    reading = None
    if _pipe is None:
        reading, _pipe = os.pipe()
        os.set_blocking(_pipe, False)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    if reading is not None:  # last: starting a thread waits, which a signal could end
        threading.Thread(
            target=_watch, args=(reading,), name="signals", daemon=True
        ).start()


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Nothing, unless an event loop has put its own pipe in the place of ours."""
    del frame
    assert _pipe is not None
    there = signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    if there != _pipe:
        signal.set_wakeup_fd(there, warn_on_full_buffer=False)
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
    global _asked
    _asked = number
    stop, name = _current, signal.Signals(number).name
    if stop is None or (_is_command and (stop.requested or not stop.unsaved)):
        leave(128 + number, f"{name}: stopped")
    if stop.requested:
        return
    stop.requested = number
    _within(1.0, lambda: _say(f"{name}: saving, then stopping (again: at once)"))


def _say(line: str) -> None:
    """Not print: the signal may have come in the middle of one."""
    start = "\n" if os.isatty(2) else ""  # below the ^C
    os.write(2, f"{start}{line}\n".encode())


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Call, and wait no longer than that: whoever reads our output may hang."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    with contextlib.suppress(RuntimeError):  # none can begin while Python shuts down
        thread.start()
        thread.join(seconds)


def _end_workers() -> None:
    """Those of multiprocessing, which hold our output open; `os._exit` leaves them."""
    loaded = sys.modules.get("multiprocessing.process")
    workers = loaded.active_children() if loaded else []
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + 0.5
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        worker.kill()


def _hold_signals() -> None:
    """Until the child has its own handlers: what is sent to it would go to our pipe,
    and the parent take it for its own (a pool ends its workers with SIGTERM)."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _as_before() -> None:
    """A forked process (a worker of a user's pool) has no such thread: it just ends."""
    global _pipe, _current, _is_command
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)
        _pipe, _current, _is_command = None, None, False
    _let_signals()


_forking = threading.local()
os.register_at_fork(
    before=_hold_signals, after_in_parent=_let_signals, after_in_child=_as_before
)
