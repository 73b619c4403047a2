"""Which charts the page of a run has, in which order, and their data, thinned.

A long run is thinned on purpose: neighbouring rows become one point, which keeps their
mean, their smallest and their largest value. So the page stays small and no spike is
lost. `page.js` draws what is made here.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowgrpo_jax.runtime import metric_meanings as meanings
from flowgrpo_jax.runtime import metric_names

Row = Mapping[str, Any]

POINTS = 400  # the most of a line
_DIGITS = 7  # a ratio of 0.9999996 is not 1
# The ways to sample the images of an evaluation: name in the legend, and dashes.
_COLUMNS = {
    metric_names.GUIDED: ("with guidance", []),
    metric_names.UNGUIDED: ("without guidance", [6, 4]),
    metric_names.STOCHASTIC: ("sampler of training", [2, 3]),
}
_SECTIONS = {
    meanings.HELD_OUT: "Held-out prompts",
    meanings.REWARD: "Rewards of training",
    meanings.TASKS: "Held-out prompts by task",
    meanings.MONITORS: "Monitors: measured, never optimised",
    meanings.UPDATE: "The update",
    "measurements": "Other measurements of rewards",
    meanings.WORK: "What an iteration consists of",
    meanings.TIME: "Time and memory",
}
_FOLDED = ("measurements", meanings.WORK, meanings.TIME)
_NO_CHART = ("iteration", "kind", metric_names.WALL, metric_names.PROCESS)


@dataclass(frozen=True)
class RunRows:
    """The rows of one run, and the names of the rewards that it optimises."""

    name: str
    train: Sequence[Row]
    evals: Sequence[Row]
    rewards: Sequence[str]


def data(runs: Sequence[RunRows]) -> dict[str, Any]:
    """All that `page.js` draws: {"runs", "axes", "sections"}, plain values of JSON.

    "axes" has for every run and kind of row the x of its points, by axis. A section has
    charts, a chart has lines, a line has `mean`, and `low` and `high` where a point
    stands for several rows.
    """
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    axes = []
    for number, run in enumerate(runs):
        parts = {"train": _buckets(run.train), "eval": _buckets(run.evals)}
        images = _images(run.train)
        axes.append({kind: _axes(part, images) for kind, part in parts.items()})
        for kind, part in parts.items():
            for key in _metrics(part):
                line = _line(part, key)
                if line is None:
                    continue
                column = metric_names.parse(key).column if kind == "eval" else ""
                label, dash = _COLUMNS.get(column, ("", []))
                _chart(charts, key, kind, run)["lines"].append(
                    {"run": number, "rows": kind, "label": label, "dash": dash} | line
                )
    _drop_copies(charts)
    sections = [
        {"title": title, "folded": name in _FOLDED, "charts": drawn}
        for name, title in _SECTIONS.items()
        if (drawn := [one for (section, _), one in charts.items() if section == name])
    ]
    return {
        "runs": [run.name for run in runs],
        "axes": axes,
        "sections": sections,
    }


def _drop_copies(charts) -> None:
    """The weighted sum of one reward is that reward: one chart is enough."""
    for kind in ("train", "eval"):
        sums = [_values(one, kind) for one in charts.values() if _is_sum(one, kind)]
        copies = [
            place
            for place, one in charts.items()
            if metric_names.parse(one["metric"]).kind == "reward"
            and not _is_sum(one, kind)
            and _values(one, kind) in sums
        ]
        for place in copies:
            del charts[place]


def _is_sum(chart, kind: str) -> bool:
    read = metric_names.parse(chart["metric"])
    of = chart["lines"][0]["rows"]
    return (read.kind, read.name, of) == ("reward", metric_names.AVERAGE, kind)


def _values(chart, kind: str) -> list:
    """The lines of a chart, but for the one that only the sum has."""
    return [
        line["mean"]
        for line in chart["lines"]
        if line["rows"] == kind
        and line["label"] != _COLUMNS[metric_names.STOCHASTIC][0]
    ]


def _metrics(part: Sequence[Sequence[Row]]) -> list[str]:
    """The names in these rows, in their order, that have a chart."""
    names = dict.fromkeys(key for bucket in part for row in bucket for key in row)
    return [name for name in names if name not in _NO_CHART]


def _chart(charts, key: str, kind: str, run: RunRows) -> dict[str, Any]:
    """The chart of a metric, made if this is its first line."""
    read, meaning = metric_names.parse(key), meanings.of(key)
    section = meaning.group
    optimised = (*run.rewards, metric_names.AVERAGE)
    if read.kind == "reward" and read.name not in optimised:
        section = "measurements"
    # A metric of evaluations has one chart for all ways to make the images.
    name = f"{read.kind} {read.name}" if kind == "eval" else key
    notes = [meaning.means, _direction(meaning, section)]
    chart = {
        "title": meaning.title,
        "note": "; ".join(note for note in notes if note),
        "healthy": meaning.healthy,
        "remedy": meaning.remedy,
        "unit": meaning.unit,
        "metric": key,
        "lines": [],
    }
    return charts.setdefault((section, name), chart)


def _direction(meaning: meanings.Meaning, section: str) -> str:
    if section != meanings.MONITORS:
        return ""
    return {1: "higher is better", -1: "lower is better", 0: "neither way is better"}[
        meaning.better
    ]


# -- thinning ------------------------------------------------------------------------------


def _buckets(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Rows in order, neighbours together where there are more than POINTS."""
    size = max(1, -(-len(rows) // POINTS))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _line(part: Sequence[Sequence[Row]], key: str) -> dict[str, Any] | None:
    """The values of a metric; None where no row has a number of it."""
    values = [
        [float(row[key]) for row in bucket if math.isfinite(row.get(key, math.nan))]
        for bucket in part
    ]
    if not any(values):
        return None
    line = {"mean": [_digits(sum(one) / len(one)) if one else None for one in values]}
    if any(len(bucket) > 1 for bucket in part):
        line["low"] = [_digits(min(one)) if one else None for one in values]
        line["high"] = [_digits(max(one)) if one else None for one in values]
    return line


def _digits(value: float) -> float | int:
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


# -- axes ------------------------------------------------------------------------------------


def _axes(
    part: Sequence[Sequence[Row]], images: Callable[[int], float | None]
) -> dict[str, list]:
    """x of the points: the middle row of each."""
    middle = [bucket[len(bucket) // 2] for bucket in part]
    found = {
        "iteration": [row["iteration"] for row in middle],
        "hours": [_hours(row) for row in middle],
        "images": [images(row["iteration"]) for row in middle],
    }
    return {name: xs for name, xs in found.items() if xs and None not in xs}


def _hours(row: Row) -> float | None:
    wall = row.get(metric_names.WALL)
    return None if wall is None else round(wall / 3600, 5)


def _images(train: Sequence[Row]) -> Callable[[int], float | None]:
    """How many images were sampled for training before an iteration; None if unknown.

    A row stands for the iterations up to the next one: with log.every above 1 most are
    not written.
    """
    rows = [row for row in train if "decoded_images" in row]
    firsts = [row["iteration"] for row in rows]
    before = [0.0]
    for row, following in zip(rows, firsts[1:], strict=False):
        span = following - row["iteration"]
        before.append(before[-1] + row["decoded_images"] * span)

    def sampled(iteration: int) -> float | None:
        if not rows:
            return None
        place = max(0, bisect.bisect_left(firsts, iteration) - 1)
        span = iteration - firsts[place]
        return before[place] + rows[place]["decoded_images"] * span

    return sampled
