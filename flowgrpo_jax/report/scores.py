"""The numbers at the top of report.html: before and after, and the table by task."""

import html
import re
from collections.abc import Sequence
from typing import Any

from flowgrpo_jax.report.charts import number

Row = dict[str, Any]

# Means over images (eval_reward_accuracy) are monitors; tasks have a score each.
_ACCURACY = re.compile(r"eval_(?!(?:unguided_)?reward_)(unguided_)?(.+)_accuracy")


def cards(
    train: Sequence[Row], evals: Sequence[Row], rows: Sequence[Row], extra: Row
) -> str:
    """The big numbers: what changed, what it cost, and the facts of report.json."""
    shown = []
    for name, key in (
        ("Score with guidance", "eval_overall_accuracy"),
        ("Score without guidance", "eval_unguided_overall_accuracy"),
    ):
        scores = _column(evals, key)
        if scores:
            shown.append(_change_card(name, scores[0], scores[-1], True))
    rewards = _column(train, "reward_avg")
    if rewards:
        few = max(1, min(5, len(rewards) // 2))
        first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
        shown.append(_change_card("Training reward", first, last, False))
    walls = _column(rows, "time/wall")
    if walls:
        per = walls[-1] / max(len(train), 1)
        more = f"{per:.1f} s an iteration, evaluation included" if train else ""
        shown.append(_card("Wall time", _duration(walls[-1]), more))
    memory = _column(rows, "time/peak_memory_gb")
    if memory:
        shown.append(_card("Peak memory", f"{max(memory):.2f} GB", "of the process"))
    for name, value in extra.get("facts", {}).items():
        shown.append(_card(str(name), html.escape(str(value)), ""))
    return f'<section class="cards">{"".join(shown)}</section>' if shown else ""


def _card(name: str, value: str, more: str) -> str:
    return (
        f'<div class="card"><div class="name">{html.escape(name)}</div>'
        f'<div class="value">{value}</div><div class="more">{more}</div></div>'
    )


def _change_card(name: str, first: float, last: float, percent: bool) -> str:
    before, after = number(first, percent), number(last, percent)
    value = f'<span class="from">{before} →</span> {after}'
    return _card(name, value, _change(first, last, percent))


def _change(first: float, last: float, percent: bool = True) -> str:
    """The signed difference, coloured; points for percentages."""
    difference = last - first
    text = f"{100 * difference:+.1f}" if percent else f"{difference:+.3g}"
    text = text.replace("-", "−") + (" points" if percent else "")
    shown = round(difference, 3 if percent else 12)
    css = "up" if shown > 0 else "down" if shown < 0 else "soft"
    return f'<span class="{css}">{text}</span>'


def score_table(evals: Sequence[Row]) -> str:
    """Scores by task, before and after, guided and unguided; "overall" comes last."""
    if not evals:
        return ""
    columns: dict[str, dict[bool, str]] = {}
    for key in evals[-1]:
        if match := _ACCURACY.fullmatch(key):
            columns.setdefault(match[2], {})[match[1] is None] = key
    if not columns:
        return ""
    tasks = sorted(columns, key=lambda task: task == "overall")
    both = any(False in keys for keys in columns.values())
    lines = []
    for task in tasks:
        cells = [_score_cells(evals, columns[task].get(True), bar=True)]
        if both:
            cells.append(_score_cells(evals, columns[task].get(False), bar=False))
        css = ' class="total"' if task == "overall" else ""
        name = html.escape(task.replace("_", " "))
        lines.append(f"<tr{css}><td>{name}</td>{''.join(cells)}</tr>")
    bar = '<th class="bar"></th>'
    times = "<th>before</th><th>after</th><th>points</th>"
    return (
        '<section><h2>Scores by task</h2><div class="table"><table><thead>'
        '<tr><th></th><th colspan="4">with guidance</th>'
        + ('<th colspan="3">without guidance</th>' if both else "")
        + f"</tr><tr><th>task</th>{times}{bar}{times if both else ''}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _score_cells(evals: Sequence[Row], key: str | None, bar: bool) -> str:
    scores = _column(evals, key) if key else []
    if not scores:
        return "<td>–</td>" * 3 + ('<td class="bar"></td>' if bar else "")
    first, last = scores[0], scores[-1]
    change = _change(first, last).replace(" points", "")
    cells = (
        f'<td class="soft">{number(first, True)}</td>'
        f"<td>{number(last, True)}</td><td>{change}</td>"
    )
    if not bar:
        return cells
    return cells + (
        f'<td class="bar"><div class="track"><i class="after" '
        f'style="width:{100 * last:.1f}%"></i><i class="before" '
        f'style="width:{100 * min(first, last):.1f}%"></i></div></td>'
    )


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [y for _, y in points(rows, key)]


def points(
    rows: Sequence[Row], key: str, x_key: str = "iteration", scale: float = 1.0
) -> list[tuple[float, float]]:
    both = [row for row in rows if {key, x_key} <= row.keys()]
    return [(float(row[x_key]) * scale, float(row[key])) for row in both]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
