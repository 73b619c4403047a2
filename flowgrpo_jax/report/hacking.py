"""Reward hacking: the optimised reward rises while what nobody optimises gets worse."""

from collections.abc import Mapping
from typing import Any

from flowgrpo_jax.runtime import metric_meanings, metric_names


def fallen(
    first: Mapping[str, Any],
    now: Mapping[str, Any],
    weights: Mapping[str, float | int],
    threshold: float,
    column: str = metric_names.GUIDED,
) -> dict[str, float]:
    """The monitors that got worse by over `threshold` as the reward rose, and by how much.

    `first` and `now` are the scores of two evaluations. A held-out reward is measured
    in units of its first std over images, the others as a share of their first value.
    Empty where the reward did not rise, or an evaluation does not measure it.
    """
    keys = {metric_names.reward(name, column): w for name, w in weights.items() if w}
    if not all(key in scores for key in keys for scores in (first, now)):
        return {}
    if sum(weight * (now[key] - first[key]) for key, weight in keys.items()) <= 0:
        return {}
    worse = {}
    for key, begin in first.items():
        read = metric_names.parse(key)
        if key not in now or read.column != column or read.kind == "accuracy":
            continue
        deviation = metric_names.deviation(read.name, column)
        held_out = read.kind == "reward" and deviation in first
        better = 1 if held_out else _better(read)
        scale = first[deviation] if held_out else abs(begin)
        change = (begin - now[key]) * better
        if scale > 0 and change > threshold * scale:
            worse[key.removeprefix(column)] = change / scale
    return worse


def _better(read: metric_names.Metric) -> int:
    """Which change of a monitor is good: 1 for a rise, -1 for a fall, 0 for neither."""
    known = metric_meanings.MEANINGS.get(read.name)
    if read.kind != "monitor" or known is None:
        return 0
    return known.better if known.group == metric_meanings.MONITORS else 0


def warning(worse: Mapping[str, float]) -> str:
    """The line that is printed for the monitors that `fallen` returns."""
    parts = [f"{name} by {share:.2f}" for name, share in worse.items()]
    return (
        "warning: reward hacking? The reward has risen since the first evaluation, and "
        f"monitors got worse: {', '.join(parts)} (of its first value, or std)"
    )
