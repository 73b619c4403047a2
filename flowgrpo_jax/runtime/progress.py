"""What a user sees while a run goes on, and how the run is asked to stop."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, SupportsFloat

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then.

    Args:
      total: iterations of the whole run.
      start: iterations that earlier processes have done.
      log_every: seconds between the plain lines; None for no lines.
      stream: the text stream to write to, stderr by default.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        log_every: SupportsFloat | None = 30,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._total = total
        self._done = start
        self._log_every = None if log_every is None else float(log_every)
        self._clock = clock
        self._opened = self._last = self._logged = clock()
        self._pace = 0.0
        self._updates = 0
        self._bar: tqdm | None = None
        if self._stream.isatty():
            columns = os.get_terminal_size(self._stream.fileno()).columns
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                ncols=None if columns else 80,  # some containers have width 0
                dynamic_ncols=bool(columns),
                mininterval=0,  # an iteration is long enough
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, iteration: int, reward: SupportsFloat, images: int) -> None:
        """Tells that `iteration` is done, its mean reward and its rollout's images."""
        now = self._clock()
        seconds, self._last = max(now - self._last, 1e-9), now
        steps, self._done = iteration + 1 - self._done, iteration + 1
        text = f"reward {float(reward):.3f}, {images / seconds:.1f} images/s"
        text += f", {_duration(self._left(seconds, steps))} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
        elif self._log_every is not None:
            done = self._done == self._total
            if done or now - self._logged >= self._log_every:
                self._logged = now
                line = f"iteration {self._done}/{self._total}: {text}"
                print(line, file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Prints a line (or a table) without breaking the bar."""
        tqdm.write(text, file=self._stream)

    def skip(self) -> None:
        """Leaves the time since the last update (an evaluation) out of the pace."""
        self._last = self._clock()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, seconds: float, steps: int) -> float:
        """Seconds to go at the recent pace."""
        latest = seconds / max(steps, 1)
        self._updates += 1
        if self._updates <= 2:  # the first one also compiled
            self._pace = latest
        self._pace += 0.2 * (latest - self._pace)
        return self._pace * (self._total - self._done)


class GracefulStop:
    """SIGTERM and SIGINT (Ctrl-C) set `requested`; the loop stops where it can.

    A second signal acts as if nothing had been installed: it ends the process. So does
    the first one in a forked child, such as a worker of a reward's multiprocessing.Pool,
    which is ended by SIGTERM.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        _installed.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _installed.remove(self)
        self.put_back()

    def put_back(self) -> None:
        """Install the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        name = signal.Signals(number).name
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{name}: stopping after this iteration (again: now)\n".encode())


_installed: list[GracefulStop] = []


def _put_back_in_child() -> None:
    """A child that was forked inherits handlers that only take note of a signal."""
    while _installed:
        _installed.pop().put_back()


os.register_at_fork(after_in_child=_put_back_in_child)


def _duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
