"""ROOT/XID/sweep.html: the units of a sweep beside each other, on one page."""

import os
from pathlib import Path

from markupsafe import Markup

from flowgrpo_jax.report.charts import Series, chart
from flowgrpo_jax.report.scores import points
from flowgrpo_jax.report.templating import render
from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.runtime.workdir import atomic_write
from launch import live, results, units
from launch.states import State
from launch.sweep_dir import SweepDir

_FILE = "sweep.html"
_COLOURS = 8  # of the style sheet; a ninth group begins again


def write(sweep: SweepDir, made: results.Table) -> Path:
    """Write the page of a sweep, and return where it is."""
    path = sweep.path / _FILE
    atomic_write(path, page(sweep, made))
    return path


def page(sweep: SweepDir, made: results.Table) -> str:
    """The page: groups by score, units with links to their reports, curves."""
    done = sum(one.is_done for one in made.states)
    return render(
        "sweep.html.j2",
        title=f"Sweep {sweep.xid}",
        facts=f"{done} of {len(made.states)} units finished · score: {made.metric}",
        command=sweep.command,
        columns=list(units.short(made.keys).values()),
        groups=[
            {
                "values": group.values,
                "mean": _number(group.mean),
                "spread": _number(group.spread),
                "colour": _colour(place),
                "members": [_member(sweep, one, made.metric) for one in group.members],
            }
            for place, group in enumerate(made.groups)
        ],
        curves=[
            curve
            for curve in (
                _curves(made, made.metric, noisy=False),
                _curves(made, metric_names.REWARD_AVERAGE, noisy=True),
                _curves(made, "kl_loss", noisy=True),
            )
            if curve
        ],
    )


def _member(sweep: SweepDir, one: State, metric: str) -> dict[str, str]:
    report = sweep.workdir(one.unit) / "report.html"
    return {
        "name": one.unit.name,
        "link": os.path.relpath(report, sweep.path) if report.exists() else "",
        "state": one.word,
        "progress": live.progress(one),
        "score": _number(one.score(metric)),
        "last_line": one.last_line,
    }


def _curves(made: results.Table, metric: str, noisy: bool) -> Markup:
    """A metric of all units in one chart: a colour for a group, a line for a unit."""
    return chart(
        metric,
        [
            Series(one.unit.name, points(one.rows, metric), _colour(place), noisy)
            for place, group in enumerate(made.groups)
            for one in group.members
        ],
    )


def _colour(place: int) -> int:
    return place % _COLOURS + 1


def _number(value: float | None) -> str:
    return results.number(value) or "–"
