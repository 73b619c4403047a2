"""The units of a sweep in groups: what differs between them, scores, mean and spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launch import states
from launch.states import State

SEED = "config.seed"


@dataclass(frozen=True)
class Group:
    """Units that differ only in their seed.

    Attributes:
      values: what sets them apart from other groups, one for each of `Table.keys`.
      members: their states, in the order of the sweep.
      scores: the last value of the metric of those that have one.
    """

    values: tuple[str, ...]
    members: list[State]
    scores: list[float]

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of two or more."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Table:
    """A sweep, best group first; `keys` are the flags in which its groups differ."""

    metric: str
    keys: list[str]
    groups: list[Group]

    @property
    def states(self) -> list[State]:
        return [one for group in self.groups for one in group.members]


def of(now: Sequence[State], metric: str | None = None) -> Table:
    """The table of these states; UserError for a metric that no unit has."""
    chosen = states.metric_of(now, metric)
    keys = list(dict.fromkeys(key for one in now for key in one.unit.point))
    differing = [
        key
        for key in keys
        if key != SEED and len({repr(one.unit.point.get(key)) for one in now}) > 1
    ]
    grouped: dict[tuple[str, ...], list[State]] = {}
    for one in now:
        values = tuple(str(one.unit.point.get(key, "")) for key in differing)
        grouped.setdefault(values, []).append(one)
    groups = [
        Group(values, members, _scores(members, chosen))
        for values, members in grouped.items()
    ]
    none = float("-inf")
    groups.sort(key=lambda one: -(none if one.mean is None else one.mean))
    return Table(chosen, differing, groups)


def number(value: float | None) -> str:
    """A score with four digits, or nothing."""
    return "" if value is None else f"{value:.4g}"


def _scores(members: Sequence[State], metric: str) -> list[float]:
    return [score for one in members if (score := one.score(metric)) is not None]
