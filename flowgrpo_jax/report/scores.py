"""The numbers at the top of report.html, before and after, and the table of tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowgrpo_jax.report.charts import number
from flowgrpo_jax.runtime import metric_names

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A number at the first and at the last evaluation; `percent` shows it as such."""

    first: float
    last: float
    percent: bool = True

    @property
    def before(self) -> str:
        return number(self.first, self.percent)

    @property
    def after(self) -> str:
        return number(self.last, self.percent)

    @property
    def lower(self) -> float:
        return min(self.first, self.last)

    @property
    def difference(self) -> str:
        """The difference with its sign, in points for percentages."""
        text = f"{100 * self._shown:+.1f}" if self.percent else f"{self._shown:+.3g}"
        return text.replace("-", "−")

    @property
    def css(self) -> str:
        """The class of its colour, "soft" if it is shown as zero."""
        return "up" if self._shown > 0 else "down" if self._shown < 0 else "soft"

    @property
    def _shown(self) -> float:
        """The difference, rounded as it is shown; adding zero turns -0.0 into 0.0."""
        return round(self.last - self.first, 3 if self.percent else 12) + 0.0


@dataclass(frozen=True)
class Card:
    """A big number with its name: a change, or a value with a line below it."""

    name: str
    value: str = ""
    more: str = ""
    change: Change | None = None


@dataclass(frozen=True)
class TaskScores:
    """A row of the table of scores; None where the task was not measured so."""

    task: str
    is_overall: bool
    guided: Change | None
    unguided: Change | None


def cards(
    train: Sequence[Row], evals: Sequence[Row], rows: Sequence[Row], extra: Row
) -> list[Card]:
    """The big numbers: what changed, what it cost, and the facts of report.json."""
    shown = []
    for name, column in (
        ("Score with guidance", metric_names.GUIDED),
        ("Score without guidance", metric_names.UNGUIDED),
    ):
        key = metric_names.accuracy(metric_names.OVERALL, column)
        if change := _change(evals, key):
            shown.append(Card(name, change=change))
    rewards = _values(train, metric_names.REWARD_AVERAGE)
    if rewards:
        few = max(1, min(5, len(rewards) // 2))
        first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
        shown.append(Card("Training reward", change=Change(first, last, False)))
    seconds = _values(rows, metric_names.WALL)
    if seconds:
        per = seconds[-1] / max(len(train), 1)
        more = f"{per:.1f} s an iteration, evaluation included" if train else ""
        shown.append(Card("Wall time", _duration(seconds[-1]), more))
    memory = _values(rows, metric_names.PEAK_MEMORY)
    if memory:
        shown.append(Card("Peak memory", f"{max(memory):.2f} GB", "of the process"))
    facts = extra.get("facts", {})
    return shown + [Card(str(name), str(value)) for name, value in facts.items()]


def score_table(evals: Sequence[Row]) -> list[TaskScores]:
    """Scores by task, guided and unguided; "overall" comes last."""
    if not evals:
        return []
    read = [metric_names.parse(key) for key in evals[-1]]
    shown = (metric_names.GUIDED, metric_names.UNGUIDED)
    tasks = [m.name for m in read if m.kind == "accuracy" and m.column in shown]
    return [
        TaskScores(
            task.replace("_", " "),
            task == metric_names.OVERALL,
            *(_change(evals, metric_names.accuracy(task, column)) for column in shown),
        )
        for task in sorted(
            dict.fromkeys(tasks), key=lambda t: t == metric_names.OVERALL
        )
    ]


def points(
    rows: Sequence[Row], key: str, x_key: str = "iteration", scale: float = 1.0
) -> list[tuple[float, float]]:
    """(x, y) of the rows that have both; x times `scale`."""
    both = [row for row in rows if {key, x_key} <= row.keys()]
    return [(float(row[x_key]) * scale, float(row[key])) for row in both]


def _change(evals: Sequence[Row], key: str) -> Change | None:
    values = _values(evals, key)
    return Change(values[0], values[-1]) if values else None


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [y for _, y in points(rows, key)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
