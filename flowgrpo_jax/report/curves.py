"""Which charts the page of a run has, and in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flowgrpo_jax.report.charts import Series, chart
from flowgrpo_jax.report.scores import Row, points
from flowgrpo_jax.runtime import metric_names

# Metric of training rows -> title of its chart and a note, in the order of the page. A
# run has those that its algorithm measures; every other metric of its rows has a chart
# under its own name.
TRAINING = {
    metric_names.REWARD_AVERAGE: ("Reward", "mean over the rollout"),
    "reward_std_mean": ("Reward spread", "mean standard deviation within a group"),
    "kl_loss": ("KL to the reference", "how far the policy has moved"),
    "clipfrac": ("Clip fraction", "share of ratios outside the clip range"),
    "ratio": ("Probability ratio", "mean of new over old policy; 1 is on-policy"),
    "approx_kl": ("Approximate KL", "between the new and the old policy"),
    "zero_std_ratio": ("Groups without a signal", "all rewards of the group equal"),
    "policy_loss": ("Policy loss", "what the update minimises, less the regularizers"),
    "grad_norm": ("Gradient norm", "before clipping"),
    metric_names.IMAGES_PER_SECOND: ("Throughput", "images per second of training"),
}
# The ways to sample the images of an evaluation: name in the legend, and colour.
_COLUMNS = {
    metric_names.GUIDED: ("with guidance", 1),
    metric_names.UNGUIDED: ("without", 2),
    metric_names.STOCHASTIC: ("sampler of training", 3),
}
_GAP = ("Gain of the sampler of training", "its reward less that of the ODE")


@dataclass(frozen=True)
class Curves:
    """All charts of a run, by section of the page."""

    main: list[Markup]
    tasks: list[Markup]
    monitors: list[Markup]
    others: list[Markup]


def of_run(train: Sequence[Row], evals: Sequence[Row]) -> Curves:
    """Charts of all metrics that have a number in a training or evaluation row."""
    main = [
        _score_chart(evals, "iteration", "iteration", 1.0),
        _score_chart(evals, metric_names.WALL, "minutes", 1 / 60),
        *(_train_chart(train, key, *text) for key, text in TRAINING.items()),
    ]
    others = [
        _train_chart(train, key, key, "")
        for key in dict.fromkeys(key for row in train for key in row)
        if key not in TRAINING and key not in ("iteration", "kind")
        if not metric_names.is_time(key)
    ]
    tasks, monitors = _eval_charts(evals)
    return Curves(*map(_drawn, (main, tasks, monitors, others)))


def _drawn(charts: Sequence[Markup]) -> list[Markup]:
    return [one for one in charts if one]


def _train_chart(train: Sequence[Row], key: str, title: str, note: str) -> Markup:
    return chart(title, [Series(key, points(train, key), noisy=True)], note=note)


def _score_chart(
    evals: Sequence[Row], x_key: str, x_label: str, scale: float
) -> Markup:
    keys = {
        column: metric_names.accuracy(metric_names.OVERALL, column)
        for column in (metric_names.GUIDED, metric_names.UNGUIDED)
    }
    series = _series(evals, keys, x_key, scale)
    unit = "iterations" if x_label == "iteration" else "wall time"
    return chart(f"Score over {unit}", series, x_label, True, "held-out prompts")


def _eval_charts(evals: Sequence[Row]) -> tuple[list[Markup], list[Markup]]:
    """One chart for each task's accuracy, one for each other evaluation metric."""
    metrics: dict[tuple[str, str], dict[str, str]] = {}
    for key in dict.fromkeys(key for row in evals for key in row):
        read = metric_names.parse(key)
        if read.column and (read.kind, read.name) != ("accuracy", metric_names.OVERALL):
            metrics.setdefault((read.kind, read.name), {})[read.column] = key
    tasks: list[Markup] = []
    monitors: list[Markup] = []
    for (kind, name), keys in metrics.items():
        title, note = name.replace("_", " ").capitalize(), ""
        if kind == "reward":
            title = f"Reward {name.replace('_', ' ')}"
        if metric_names.GAP in keys.values():
            title, note = _GAP
        is_task = kind == "accuracy"
        drawn = chart(title, _series(evals, keys), percent=is_task, note=note)
        (tasks if is_task else monitors).append(drawn)
    return tasks, monitors


def _series(
    evals: Sequence[Row],
    keys: Mapping[str, str],
    x_key: str = "iteration",
    scale: float = 1.0,
) -> list[Series]:
    """A line for each column that has the metric; `keys`: column -> metric."""
    return [
        Series(label, points(evals, keys[column], x_key, scale), colour)
        for column, (label, colour) in _COLUMNS.items()
        if column in keys
    ]
