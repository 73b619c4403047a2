"""The progress bar, or lines, that a user sees during a run."""

import os
import sys
import time
from collections.abc import Callable, Collection
from typing import Any, SupportsFloat

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere a plain line every `log_every` seconds.

    Args:
      total: iterations of the whole run.
      start: iterations that earlier processes have done.
      pauses: the iterations that begin with an evaluation.
      log_every: seconds between the plain lines; None for no lines.
      stream: the text stream to write to, stderr by default.
      clock: gives seconds; tests give their own.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        pauses: Collection[int] = (),
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
        self._pauses = pauses
        self._pause = 0.0
        self._pace: float | None = None  # None until an iteration did not compile
        self._compiled = False
        self._bar: tqdm | None = None
        if self._stream.isatty():
            columns = os.get_terminal_size(self._stream.fileno()).columns
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                ncols=None if columns else 80,  # some containers have width 0
                dynamic_ncols=bool(columns),
                mininterval=0,  # every update is shown: iterations are slow
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, iteration: int, reward: SupportsFloat, images: int) -> None:
        """Shows that `iteration` is done; its rollout sampled `images` images."""
        now = self._clock()
        seconds, self._last = max(now - self._last, 1e-9), now
        steps, self._done = iteration + 1 - self._done, iteration + 1
        text = f"reward {float(reward):.3f}, {images / seconds:.1f} images/s"
        left = self._left(seconds / max(steps, 1))
        text += "" if left is None else f", {_duration(left)} left"
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
        """Leaves the time since the last update, an evaluation's, out of the pace."""
        now = self._clock()
        self._pause, self._last = now - self._last, now

    def close(self) -> None:
        """Closes the bar and leaves it visible."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, latest: float) -> float | None:
        """Seconds left, from the pace of recent iterations and the last evaluation.

        None after the first iteration of a process, whose time includes compilation.
        """
        if self._compiled:
            pace = latest if self._pace is None else self._pace
            self._pace = pace + 0.2 * (latest - pace)
        self._compiled = True
        iterations = self._total - self._done
        if iterations and self._pace is None:
            return None
        pauses = sum(pause >= self._done for pause in self._pauses)
        return (self._pace or 0.0) * iterations + self._pause * pauses


def _duration(seconds: float) -> str:
    """The time as h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
