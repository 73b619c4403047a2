"""How far each unit of a sweep is, read from its workdir alone, whoever runs it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.runtime.metrics import read_metrics
from flowgrpo_jax.runtime.workdir import read_config
from launch import unit as units
from launch.sweep_dir import SweepDir
from launch.units import Unit

# What a unit may be; those after "running" need another start.
WORDS = ("waiting", "running", "stopped", "killed", "failed", "finished")
# The score of a unit, unless another metric is named: the first of these that it has.
SCORES = (
    metric_names.accuracy(metric_names.OVERALL),
    metric_names.reward(metric_names.AVERAGE, metric_names.GUIDED),
    metric_names.REWARD_AVERAGE,
)
_TAIL = 4096  # bytes of a log that its last line is looked for in

Row = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A unit and how far it is.

    Attributes:
      word: one of WORDS.
      iteration: how many are done; `total` of how many, None before it began.
      reward: the mean reward of the last iteration.
      left: seconds to go at the pace so far, evaluations included.
      last_line: the last line that it printed, of a unit that did not finish.
      code: its exit code, None while it has none.
    """

    unit: Unit
    word: str
    iteration: int
    total: int | None
    reward: float | None
    left: float | None
    rows: list[Row]
    last_line: str
    code: int | None

    @property
    def is_done(self) -> bool:
        return self.word == "finished"

    def score(self, metric: str) -> float | None:
        """The last value of a metric of evaluations or of training."""
        values = [row[metric] for row in self.rows if metric in row]
        return float(values[-1]) if values else None


def of(sweep: SweepDir) -> list[State]:
    """The state of every unit, in their order."""
    return [state(sweep.workdir(unit), unit) for unit in sweep.units]


def state(workdir: Path, unit: Unit) -> State:
    """The state of one unit."""
    record = units.read(workdir) or {}
    try:
        rows = read_metrics(workdir)
        held = read_config(workdir) if (workdir / "config.json").exists() else {}
    except UserError as error:  # the unit itself will refuse it, in the same words
        return State(unit, "failed", 0, None, None, None, [], str(error), 1)
    train = [row for row in rows if row.get("kind") != "eval"]
    done = int(train[-1]["iteration"]) + 1 if train else 0
    word = _word(workdir, unit, record)
    total = held.get("num_iterations")
    reward = train[-1].get(metric_names.REWARD_AVERAGE) if train else None
    return State(
        unit,
        word,
        done,
        total,
        reward,
        _left(rows, done, total) if word == "running" else None,
        rows,
        "" if word in ("waiting", "running", "finished") else _last_line(workdir),
        record.get("code"),
    )


def metric_of(states: Sequence[State], wanted: str | None = None) -> str:
    """The metric that units are compared by; UserError for one that none has."""
    found = {name for one in states for row in one.rows for name in row}
    if wanted is None:
        return next((name for name in SCORES if name in found), SCORES[-1])
    if wanted not in found:
        some = ", ".join(sorted(found - {"iteration", "kind"})[:12])
        raise UserError(
            f"--metric: {wanted}: no unit has it: "
            + (f"they have {some}, ..." if some else "none has a row yet")
        )
    return wanted


def seconds(value: float | None) -> str:
    """A time as h:mm:ss, or "" for none."""
    if value is None or not math.isfinite(value):
        return ""
    minutes, second = divmod(round(value), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _word(workdir: Path, unit: Unit, record: dict[str, Any]) -> str:
    if not record:
        return "waiting"
    code = record.get("code")
    if code is None:
        return "running" if units.is_running(workdir) else "killed"
    if code == 0:  # of fewer iterations, say: it is to go on
        same = tuple(_unplaced(record.get("words", ()))) == unit.words
        return "finished" if same else "waiting"
    if code in units.SAVED:
        return "stopped"
    return "killed" if code > 128 else "failed"


def _unplaced(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith("--workdir=")]


def _left(rows: Sequence[Row], done: int, total: int | None) -> float | None:
    """By the wall clock of the run: what an iteration took on average, times the rest."""
    timed = [row for row in rows if metric_names.WALL in row]
    if total is None or len(timed) < 2 or done < 2:
        return None
    first, last = timed[0], timed[-1]
    passed = last[metric_names.WALL] - first[metric_names.WALL]
    return passed / done * (total - done)


def _last_line(workdir: Path) -> str:
    """The last line of the log; of a traceback that is the error itself."""
    path = workdir / units.LOG
    if not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _TAIL))
        lines = log.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
