"""One surface, fed with many inputs: what became of each, and the smallest bad ones.

A check returns RIGHT (accepted, and the oracle agrees) or REFUSED (it caught the
`UserError`, one line for the user; `refused` does that). It raises `Wrong` for what was
accepted though the oracle knows better. Any other exception is a traceback that a user
would have seen, and what takes longer than `seconds` is a hang.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies

from flowgrpo_jax.errors import UserError

RIGHT, REFUSED = "right", "refused"
TRACEBACK, HANG, WRONG = "traceback", "hang", "wrong"
BAD = (TRACEBACK, HANG, WRONG)


class Wrong(Exception):
    """Accepted in silence, though the oracle knows that it is not right."""


class _TooLong(BaseException):
    """Not an Exception: what is tried must not swallow it."""


@dataclass(frozen=True)
class Surface:
    """A place where input of others comes in.

    Args:
      name: as the command calls it.
      inputs: a hypothesis strategy of what is handed in.
      check: feeds one input to the package; see the top of this file.
      seeds: byte strings that a coverage-guided fuzzer (atheris) mutates and hands to
        `check_bytes`; none where the surface has no bytes.
      check_bytes: as `check`, of raw bytes.
      seconds: one input may take that long.
    """

    name: str
    inputs: strategies.SearchStrategy
    check: Callable[[Any], str]
    seeds: Sequence[bytes] = ()
    check_bytes: Callable[[bytes], str] | None = None
    seconds: float = 10.0


@dataclass
class Tally:
    """What became of the inputs so far; one example of every kind of failure."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(
        self, outcome: str, kind: str = "", given: str = "", told: str = ""
    ) -> None:
        self.counts[outcome] += 1
        if outcome in BAD:
            kept = self.examples.get(kind)
            if kept is None or len(given) < len(kept[0]):
                self.examples[kind] = given, told

    @property
    def bad(self) -> int:
        return sum(self.counts[outcome] for outcome in BAD)

    def row(self, name: str) -> str:
        """A row of the table of docs/reliability.md."""
        counts = [self.counts[key] for key in (RIGHT, REFUSED, *BAD)]
        return "| " + " | ".join(map(str, (name, sum(counts), *counts))) + " |"


HEAD = (
    "| surface | inputs | right | refused in one line | tracebacks | hangs "
    "| accepted wrongly |\n|---|---|---|---|---|---|---|"
)


@contextlib.contextmanager
def refused() -> Iterator[list[str]]:
    """Within it a UserError is an answer; the list then holds its line.

    It must be one that a person can read: of one line, not empty, no repr of an object.
    """
    lines: list[str] = []
    try:
        yield lines
    except UserError as error:
        line = str(error)
        if not line.strip() or " object at 0x" in line:
            raise Wrong(f"a line that tells nothing: {line!r}") from error
        lines.append(line)


def run(surface: Surface, inputs: int, seed: int, tally: Tally) -> None:
    """Draw that many inputs by hypothesis and check them."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(surface.inputs)
    def one(given: Any) -> None:
        try_one(surface.check, given, surface.seconds, tally)

    one()


def try_one(
    check: Callable[[Any], str], given: Any, seconds: float, tally: Tally
) -> None:
    """Check one input and count what became of it."""
    shown = repr(given)[:2000]
    try:
        with _alarm(seconds):
            outcome = check(given)
        assert outcome in (RIGHT, REFUSED), outcome
        tally.add(outcome)
    except Wrong as error:
        tally.add(WRONG, f"wrong: {str(error)[:60]}", shown, str(error))
    except _TooLong:
        tally.add(HANG, "hang", shown, f"longer than {seconds:g} s")
    except hypothesis.errors.UnsatisfiedAssumption:
        raise
    except BaseException as error:  # SystemExit and the like would end the user's run
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "flowgrpo_jax" in frame.filename]
        where = ours[-1] if ours else frames[-1]
        kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        tally.add(TRACEBACK, kind, shown, "".join(traceback.format_exception(error)))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_bytes(name: str, inputs: int, seed: int, tally: Tally) -> None:
    """Let atheris mutate the surface's seeds, guided by coverage, in a process apart.

    libFuzzer ends its process itself, so the counts come back in a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "tally.json"
        command = [sys.executable, "-m", "benchmarks.fuzz.with_atheris", name]
        done = subprocess.run(
            [*command, str(result), str(inputs), str(seed + 1)],  # 0 would be any seed
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        if not result.is_file():  # the interpreter itself has died
            tally.add(TRACEBACK, f"{name}: bytes", told=done.stderr[-2000:])
            return
        counts, examples = json.loads(result.read_text())
    tally.counts.update(counts)
    for kind, example in examples.items():
        tally.examples.setdefault(kind, tuple(example))
