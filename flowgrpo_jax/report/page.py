"""report.html: one page about a run, made from its workdir alone.

It needs config.json and metrics.jsonl, shows samples/iteration_*.png, and takes an
optional report.json: {"title", "command", "facts": {name: text}, "notes": [text],
"tables": [{"title", "columns", "rows"}]}. The page loads nothing and runs no script.

Rows of kind "eval" give the scores: `eval_<task>_accuracy` with guidance,
`eval_unguided_<task>_accuracy` without; what else starts with `eval_` is a monitor.
"""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report.charts import Series, chart
from flowgrpo_jax.report.scores import Row, cards, points, score_table
from flowgrpo_jax.report.style import STYLE
from flowgrpo_jax.runtime import environment
from flowgrpo_jax.runtime.metrics import read_metrics
from flowgrpo_jax.runtime.workdir import atomic_write, parse_json, read_config

_FILE = "report.html"
_MONITOR = re.compile(r"eval_(unguided_)?(.+)")
_BETWEEN = 6
_EMBEDDED_BYTES = 400_000
_EMBEDDED_SIDE = 1024

# metric -> title, and what it tells; the order of the page
_CURVES = {
    "reward_avg": ("Reward", "mean over the rollout"),
    "reward_std_mean": ("Reward spread", "mean standard deviation within a group"),
    "kl_loss": ("KL to the reference", "how far the policy has moved"),
    "clipfrac": ("Clip fraction", "share of ratios outside the clip range"),
    "ratio": ("Probability ratio", "new over old policy; 1 is on-policy"),
    "ratio_mean": ("Probability ratio", "new over old policy; 1 is on-policy"),
    "ratio_std": ("Ratio spread", "standard deviation of the ratio"),
    "approx_kl": ("Approximate KL", "between the new and the old policy"),
    "zero_std_ratio": ("Groups without a signal", "all rewards of the group equal"),
    "policy_loss": ("Policy loss", "the clipped objective"),
    "grad_norm": ("Gradient norm", "before clipping"),
}


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html` and returns its path."""
    workdir = Path(workdir)
    config = read_config(workdir)
    rows = read_metrics(workdir)
    extra = _read_extra(workdir / "report.json")
    train = [row for row in rows if row.get("kind") != "eval"]
    evals = [row for row in rows if row.get("kind") == "eval"]
    title = str(
        extra.get("title") or f"{config.get('recipe', 'run')} on {workdir.name}"
    )
    sections = [
        _header(title, extra, config, train),
        cards(train, evals, rows, extra),
        score_table(evals),
        _extra_tables(extra),
        _contact_sheet(workdir / "samples"),
        _curves(train, evals),
        _made_on(environment.history(workdir)),
        _config(config),
    ]
    path = workdir / _FILE
    atomic_write(path, page(title, sections))
    return path


def _read_extra(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        extra = dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not JSON ({error}): mend or delete it") from error
    return extra


def page(title: str, sections: Sequence[str]) -> str:
    """A page in the style of the report; it loads nothing and runs no script."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n<footer>Written by flowgrpo_jax.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _header(title: str, extra: Row, config: Row, train: Sequence[Row]) -> str:
    facts = [
        f"{key} {config[key]}"
        for key in ("model", "recipe", "seed")
        if isinstance(config.get(key), (str, int))
    ]
    if train:
        facts.append(f"{train[-1]['iteration'] + 1} iterations")
    command = extra.get("command")
    block = f"<pre>{html.escape(str(command))}</pre>" if command else ""
    notes = "".join(f"<p>{html.escape(str(n))}</p>" for n in extra.get("notes", []))
    line = html.escape(" · ".join(facts))
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="soft">{line}</p>{notes}{block}</header>'
    )


def _extra_tables(extra: Row) -> str:
    sections = []
    for table in extra.get("tables", []):
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in table["columns"])
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
            for row in table["rows"]
        )
        sections.append(
            f"<section><h2>{html.escape(str(table['title']))}</h2>"
            f'<div class="table"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div></section>"
        )
    return "".join(sections)


def _curves(train: Sequence[Row], evals: Sequence[Row]) -> str:
    main = [
        _score_chart(evals, "iteration", 1.0),
        _score_chart(evals, "minutes", 1 / 60),
    ]
    main += [_train_chart(train, key, *text) for key, text in _CURVES.items()]
    names = dict.fromkeys(key for row in train for key in row)
    rest = [
        _train_chart(train, key, key, "")
        for key in names
        if key not in _CURVES and key not in ("iteration", "kind")
        if not key.startswith("time/") or key == "time/images_per_second"
    ]
    by_task, monitors = _eval_charts(evals)
    body = _charts("Curves", main)
    body += _charts("Scores by task through training", by_task)
    body += _charts("Monitors", monitors)
    rest = [one for one in rest if one]
    if rest:
        body += (
            f"<details><summary>All other metrics ({len(rest)})</summary>"
            f'<div class="charts">{"".join(rest)}</div></details>'
        )
    return body


def _charts(title: str, charts: Sequence[str]) -> str:
    if not any(charts):
        return ""
    return f'<section><h2>{title}</h2><div class="charts">{"".join(charts)}</div></section>'


def _score_chart(evals: Sequence[Row], x_label: str, scale: float) -> str:
    x_key = "iteration" if x_label == "iteration" else "time/wall"
    series = [
        Series(name, points(evals, key, x_key, scale), colour)
        for name, key, colour in (
            ("with guidance", "eval_overall_accuracy", 1),
            ("without", "eval_unguided_overall_accuracy", 2),
        )
    ]
    unit = "iterations" if x_label == "iteration" else "wall time"
    return chart(f"Score over {unit}", series, x_label, True, "held-out prompts")


def _train_chart(train: Sequence[Row], key: str, title: str, note: str) -> str:
    return chart(title, [Series(key, points(train, key), noisy=True)], note=note)


def _eval_charts(evals: Sequence[Row]) -> tuple[list[str], list[str]]:
    """One chart for each task's accuracy, one for each other evaluation metric."""
    pairs: dict[str, dict[bool, str]] = {}
    for key in dict.fromkeys(key for row in evals for key in row):
        match = _MONITOR.fullmatch(key)
        if match and match[2] != "overall_accuracy":
            pairs.setdefault(match[2], {})[match[1] is None] = key
    tasks: list[str] = []
    monitors: list[str] = []
    for name, keys in pairs.items():
        task = name.removesuffix("_accuracy")
        series = [
            Series(label, points(evals, keys[guided]), colour)
            for guided, label, colour in (
                (True, "with guidance", 1),
                (False, "without", 2),
            )
            if guided in keys
        ]
        title = task.replace("_", " ").capitalize()
        is_task = task != name
        (tasks if is_task else monitors).append(chart(title, series, percent=is_task))
    return tasks, monitors


def _contact_sheet(samples: Path) -> str:
    """The same noise through training: first and last large, some of those between."""
    found = sorted(samples.glob("iteration_*.png"), key=_iteration)
    if not found:
        return ""
    last = len(found) - 1
    parts = min(_BETWEEN, last - 1) + 1
    between = [found[round(i * last / parts)] for i in range(1, parts)]
    pair = _figure(found[0], "before")
    pair += _figure(found[-1], "after") if last else ""
    strip = "".join(_figure(path) for path in between)
    return (
        "<section><h2>The same prompts and noise through training</h2>"
        f'<div class="sheet pair">{pair}</div><div class="sheet">{strip}</div></section>'
    )


def _figure(path: Path, remark: str = "") -> str:
    caption = f"iteration {_iteration(path)}"
    return figure(path.read_bytes(), f"samples at {caption}", caption, remark)


def figure(png: bytes, alternative: str, caption: str, remark: str = "") -> str:
    """An image in the page, its caption on the left and a remark on the right."""
    alternative, caption, remark = map(html.escape, (alternative, caption, remark))
    return (
        f'<figure><img src="{_embed(png)}" alt="{alternative}"><figcaption>'
        f'<span>{caption}</span><span class="soft">{remark}</span></figcaption></figure>'
    )


def _iteration(path: Path) -> int:
    digits = re.search(r"(\d+)", path.stem)
    return int(digits[1]) if digits else 0


def _embed(data: bytes) -> str:
    """A data URL of a PNG; a large one becomes a JPEG of at most 1024 pixels."""
    kind = "png"
    if len(data) > _EMBEDDED_BYTES:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((_EMBEDDED_SIDE, _EMBEDDED_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _made_on(entries: Sequence[Row]) -> str:
    """Devices and versions; the numbers are equal to the bit only on such ones."""
    parts = "".join(
        f"<details><summary>from iteration {entry['from_iteration']}</summary>"
        f"{_pairs(list(entry['environment'].items()))}</details>"
        for entry in entries
    )
    return f"<section><h2>Made on</h2>{parts}</section>" if entries else ""


def _config(config: Row) -> str:
    return (
        "<section><h2>Config</h2><details><summary>All keys</summary>"
        f"{_pairs(_flat(config))}</details></section>"
    )


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    lines = "".join(
        f"<div><span class='soft'>{html.escape(key)}</span>"
        f"<span>{html.escape(json.dumps(value))}</span></div>"
        for key, value in pairs
    )
    return f'<div class="config">{lines}</div>'


def _flat(config: Row, prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs
