"""The table that a launcher shows while it waits: live on a terminal, else quiet."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from launch import states
from launch.states import State
from launch.sweep_dir import SweepDir

_HEAD = ("unit", "state", "iteration", "reward", "left")
_EVERY = 2.0  # seconds between two looks at the workdirs


class Live:
    """On a terminal a table in place; elsewhere a line where a unit's state changes."""

    def __init__(self, sweep: SweepDir, stream: Any = None):
        self._sweep = sweep
        self._stream = stream or sys.stderr
        self._before: dict[int, str] = {}
        self._drawn = 0  # lines of the table that stands above the cursor
        self._last = 0.0

    def show(self, at_once: bool = False) -> None:
        """Look, and show what is new; at most every two seconds unless `at_once`."""
        if not at_once and time.monotonic() - self._last < _EVERY:
            return
        self._last = time.monotonic()
        now = states.of(self._sweep)
        if self._stream.isatty():
            self._draw(now)
        else:
            self._tell(now)

    def message(self, line: str) -> None:
        """A line that stays, above the table."""
        self._print(f"\033[{self._drawn}F\033[J{line}" if self._drawn else line)
        self._drawn = 0

    def _draw(self, now: Sequence[State]) -> None:
        lines = aligned([_HEAD, *(_cells(one) for one in now)])
        up = f"\033[{self._drawn}F\033[J" if self._drawn else ""
        self._print(up + "\n".join(lines))
        self._drawn = len(lines)

    def _tell(self, now: Sequence[State]) -> None:
        for one in now:
            if one.word != self._before.get(one.unit.wid, "waiting"):
                told = f": {one.last_line}" if one.last_line else ""
                self._print(f"unit {one.unit.name}: {one.word}{told}")
            self._before[one.unit.wid] = one.word

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: columns as wide as their longest cell, the last as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _cells(one: State) -> tuple[str, ...]:
    return (
        one.unit.name,
        one.word,
        progress(one),
        "" if one.reward is None else f"{one.reward:.3f}",
        states.seconds(one.left),
    )


def progress(one: State) -> str:
    """How many iterations of how many."""
    return "" if one.total is None else f"{one.iteration}/{one.total}"
