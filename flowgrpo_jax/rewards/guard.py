"""Calls a user's reward: what it raises becomes one line, what it changes is put back.

It runs inside our process, so it can do anything to it. What is put back: the current
folder, the handlers of signals, jax's flags (compiled programs depend on them),
sys.stdout and sys.stderr, numpy's handling of errors, and that a warning is no error.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from flowgrpo_jax.errors import UserError

Result = TypeVar("Result")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_CALLERS = (__file__, str(Path(__file__).with_name("custom.py")))
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RewardFailure(UserError):
    """A reward gave no usable scores; the line names the reward."""


def call(line: Callable[[str], str], function: Callable[[], Result]) -> Result:
    """Calls `function`, which calls a user's code, and leaves the process as it was.

    Whatever it raises becomes a RewardFailure with the text that `line` makes of it and
    with the user's traceback. UserErrors and what our own signals raise are passed on.
    """
    came: list[int] = []
    try:
        with _kept, _signals(came), np.errstate():
            return function()
    except UserError:
        raise
    except BaseException as error:  # SystemExit, KeyboardInterrupt and all others
        if came and not isinstance(error, Exception):
            raise
        failure = RewardFailure(line(described(error)))
        failure.shown = users_traceback(error)
        raise failure from error


def ends_children(function: Callable[..., Result]) -> Callable[..., Result]:
    """Wraps a function so that a process that it forks ends when it returns from it.

    Otherwise the forked process would go on as a second run.
    """

    def guarded(*args: Any, **options: Any) -> Result:
        process = os.getpid()
        try:
            result = function(*args, **options)
        except BaseException as error:
            if os.getpid() != process:
                _end_child(error)
            raise
        if os.getpid() != process:
            _end_child(None)
        return result

    return guarded


def described(error: BaseException) -> str:
    """The type and the text of an error, as a part of one line."""
    text = one_line(error)[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(value: object) -> str:
    """The text of a user's object on one line; never raises."""
    try:
        text = " ".join(str(value).split())
    except BaseException:  # str() runs the user's code too
        return "its text cannot be shown"
    text = re.sub(" at 0x[0-9a-f]+", "", text)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def users_traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on, without our frames or an import's.

    Empty if no frame is the user's: then the line says everything.
    """
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    calls = [n for n, one in enumerate(frames) if _file(one) in _CALLERS]
    frames = frames[calls[-1] + 1 if calls else 0 :]
    while frames and _is_ours(_file(frames[0])):
        del frames[0]
    trace = frames[0] if frames else None
    if trace is None and not isinstance(error, SyntaxError):
        return ""
    try:
        lines = traceback.format_exception(type(error), error, trace)
    except Exception:  # the exception's own methods may fail
        return ""
    return "".join(lines)[-20_000:].rstrip()


def put_back() -> None:
    """Undo the changes of a call that is still running."""
    _kept.put_back()


def _file(trace: TracebackType) -> str:
    return trace.tb_frame.f_code.co_filename


def _is_ours(file: str) -> bool:
    of_import = file.startswith("<frozen importlib") or file == importlib.__file__
    return of_import or file.startswith(_PACKAGE)


def _end_child(error: BaseException | None) -> NoReturn:
    """End a forked child as Python ends a process."""
    code: Any = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else error.code is not None
    elif error is not None:
        print(users_traceback(error), file=sys.stderr)
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


class _Kept:
    """The state of the process before the calls that are running now.

    Several rewards run side by side: the first call that begins notes the state, and
    the last one that ends restores it.
    """

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._replaced: list[Any] = []  # streams: closed when collected, ours with them
        self._noted_flags: set[str] = set()

    def __enter__(self) -> None:
        with self._lock:
            if self._calls == 0:
                self._take_note()
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._put_back()

    def put_back(self) -> None:
        with self._lock:
            if self._calls:
                self._put_back()

    def _take_note(self) -> None:
        try:
            self._folder: str | None = os.getcwd()
        except OSError:  # it was removed
            self._folder = None
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._flags = _flags()
        self._warnings = list(warnings.filters)

    def _put_back(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(self._folder)
        for name, stream in self._streams.items():
            if getattr(sys, name) is not stream and _is_open(stream):
                self._replaced.append(getattr(sys, name))
                setattr(sys, name, stream)
        for flag, value in _flags().items():
            if flag in self._flags and value != self._flags[flag]:
                with contextlib.suppress(Exception):  # too late for this flag
                    jax.config.update(flag, self._flags[flag])
                self._tell_once(flag)
        kept = [
            one
            for one in warnings.filters
            if one[0] != "error" or one in self._warnings
        ]
        if len(kept) < len(warnings.filters):
            warnings.resetwarnings()
            warnings.filters.extend(kept)  # type: ignore[attr-defined]

    def _tell_once(self, flag: str) -> None:
        if flag not in self._noted_flags:
            self._noted_flags.add(flag)
            print(
                f"note: a reward has changed {flag}: put back, since the programs of the "
                "run depend on it",
                file=sys.stderr,
                flush=True,
            )


def _flags() -> dict[str, Any]:
    """jax's flags without the transfer guard, which each thread has for itself."""
    return {k: v for k, v in jax.config.values.items() if "transfer_guard" not in k}


_kept = _Kept()


def _is_open(stream: Any) -> bool:
    try:
        return not stream.closed
    except (AttributeError, ValueError):  # the stream is None or detached
        return False


@contextlib.contextmanager
def _signals(came: list[int]) -> Iterator[None]:
    """Restores the handlers of signals; a real Ctrl-C is appended to `came`.

    Only the main thread can set handlers, and only there does one raise anything. The
    handlers of `stopping`, which raise nothing, stay and receive signals meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPS}

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
