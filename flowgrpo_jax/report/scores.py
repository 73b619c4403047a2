"""The numbers at the top of the page of a run, before and after, and its tables.

All are those of evaluations: a card, the end of its curve and the row of its table agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowgrpo_jax.report.charts import number
from flowgrpo_jax.runtime import metric_names

Row = Mapping[str, Any]


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
    train: Sequence[Row],
    evals: Sequence[Row],
    rows: Sequence[Row],
    rewards: Sequence[str],
    extra: Row,
) -> list[Card]:
    """The big numbers: what changed, what it cost, and the facts of report.json.

    `rewards`: the names of those that are optimised.
    """
    shown = _score_cards(evals, rewards)
    trained = _values(train, metric_names.REWARD_AVERAGE)
    if trained and not shown:
        few = max(1, len(trained) // 10)
        first, last = sum(trained[:few]) / few, sum(trained[-few:]) / few
        shown.append(Card("Training reward", change=Change(first, last, False)))
    seconds = _values(rows, metric_names.WALL)
    if seconds:
        per = seconds[-1] / max(len(train), 1)
        more = f"{per:.1f} s an iteration, evaluation included" if train else ""
        shown.append(Card("Wall time", duration(seconds[-1]), more))
    memory = _values(rows, metric_names.PEAK_MEMORY)
    if memory:
        shown.append(Card("Peak memory", f"{max(memory):.2f} GB", "of the process"))
    facts = extra.get("facts", {})
    return shown + [Card(str(name), str(value)) for name, value in facts.items()]


def _score_cards(evals: Sequence[Row], rewards: Sequence[str]) -> list[Card]:
    """Accuracy where it is measured, else every reward that is optimised."""
    shown = []
    for name, column in (
        ("Score with guidance", metric_names.GUIDED),
        ("Score without guidance", metric_names.UNGUIDED),
    ):
        key = metric_names.accuracy(metric_names.OVERALL, column)
        if change := _change(evals, key):
            shown.append(Card(name, "", "held-out prompts", change))
    names = rewards if len(rewards) == 1 else (metric_names.AVERAGE, *rewards)
    for name in names if not shown or len(rewards) > 1 else ():
        key = metric_names.reward(name, metric_names.GUIDED)
        if change := _change(evals, key, percent=False):
            is_sum = name == metric_names.AVERAGE
            title = "weighted sum" if is_sum else name.replace("_", " ")
            shown.append(Card(f"Held-out {title}", "", "mean reward", change))
    return shown


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


def reward_table(evals: Sequence[Row], rewards: Sequence[str]) -> list[TaskScores]:
    """Every reward and what it measures beside it; the weighted sum comes last."""
    read = [metric_names.parse(key) for row in evals for key in row]
    columns = (metric_names.GUIDED, metric_names.UNGUIDED)
    named = [one.name for one in read if one.kind == "reward" and one.column in columns]
    names = [name for name in dict.fromkeys(named) if name != metric_names.AVERAGE]
    names.sort(key=lambda name: name not in rewards)
    if len(rewards) > 1:
        names.append(metric_names.AVERAGE)
    return [
        TaskScores(
            "weighted sum" if name == metric_names.AVERAGE else name.replace("_", " "),
            name == metric_names.AVERAGE,
            *(
                _change(evals, metric_names.reward(name, column), percent=False)
                for column in columns
            ),
        )
        for name in names
    ]


def tag_table(first: Sequence[Row], last: Sequence[Row]) -> list[TaskScores]:
    """The reward by tag of the prompts that two evaluations share; [] for one tag."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for tag, _, before, after in shared_prompts(first, last):
        pairs.setdefault(tag, []).append((before, after))
    if len(pairs) < 2:
        return []
    return [
        TaskScores(tag.replace("_", " ") or "–", False, _of_means(both), None)
        for tag, both in pairs.items()
    ]


def _of_means(pairs: Sequence[tuple[float, float]]) -> Change:
    before, after = zip(*pairs, strict=True)
    return Change(sum(before) / len(pairs), sum(after) / len(pairs), False)


def shared_prompts(
    first: Sequence[Row], last: Sequence[Row]
) -> list[tuple[str, str, float, float]]:
    """(tag, prompt, reward before, after) of the prompts in both evaluations."""
    before = {row["prompt"]: row["scores"].get(metric_names.AVERAGE) for row in first}
    after = [
        (row["tag"], row["prompt"], row["scores"].get(metric_names.AVERAGE))
        for row in last
    ]
    return [
        (tag, prompt, begin, end)
        for tag, prompt, end in after
        if (begin := before.get(prompt)) is not None and end is not None
    ]


def points(
    rows: Sequence[Row], key: str, x_key: str = "iteration", scale: float = 1.0
) -> list[tuple[float, float]]:
    """(x, y) of the rows that have both; x times `scale`."""
    both = [row for row in rows if {key, x_key} <= row.keys()]
    return [(float(row[x_key]) * scale, float(row[key])) for row in both]


def _change(evals: Sequence[Row], key: str, percent: bool = True) -> Change | None:
    values = [value for value in _values(evals, key) if math.isfinite(value)]
    return Change(values[0], values[-1], percent) if values else None


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [y for _, y in points(rows, key)]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
