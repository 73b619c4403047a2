"""report.html: one page about a run, written from its workdir alone.

It needs config.json and metrics.jsonl, shows samples/iteration_*.png, and takes an
optional report.json: {"title", "command", "facts": {name: text}, "notes": [text],
"tables": [{"title", "columns", "rows"}]}. The page loads nothing and runs no script.

Rows of kind "eval" give the scores; runtime/metric_names.py says what their names mean.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report import curves, pictures, scores
from flowgrpo_jax.report.scores import Row
from flowgrpo_jax.report.templating import render
from flowgrpo_jax.runtime import environment
from flowgrpo_jax.runtime.metrics import read_metrics
from flowgrpo_jax.runtime.workdir import atomic_write, parse_json, read_config

_FILE = "report.html"


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html` and returns its path."""
    workdir = Path(workdir)
    config = read_config(workdir)
    rows = read_metrics(workdir)
    extra = _read_extra(workdir / "report.json")
    train = [row for row in rows if row.get("kind") != "eval"]
    evals = [row for row in rows if row.get("kind") == "eval"]
    page = render(
        "report.html.j2",
        title=extra.get("title") or f"{config.get('recipe', 'run')} on {workdir.name}",
        facts=_facts(config, train),
        notes=extra.get("notes", []),
        command=extra.get("command"),
        cards=scores.cards(train, evals, rows, extra),
        scores=scores.score_table(evals),
        tables=extra.get("tables", []),
        pictures=pictures.contact_sheet(workdir / "samples"),
        curves=curves.of_run(train, evals),
        made_on=_made_on(environment.history(workdir)),
        config=_as_json(_flat(config)),
    )
    path = workdir / _FILE
    atomic_write(path, page)
    return path


def _read_extra(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        extra = dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not JSON ({error}): correct or delete it") from error
    return extra


def _facts(config: Row, train: Sequence[Row]) -> list[str]:
    """The line under the title: model, recipe, seed, and number of iterations."""
    facts = [
        f"{key} {config[key]}"
        for key in ("model", "recipe", "seed")
        if isinstance(config.get(key), (str, int))
    ]
    if train:
        facts.append(f"{train[-1]['iteration'] + 1} iterations")
    return facts


def _made_on(entries: Sequence[Row]) -> list[tuple[int, list[tuple[str, str]]]]:
    """(first iteration, devices and versions); only equal ones give equal bits."""
    return [
        (entry["from_iteration"], _as_json(entry["environment"].items()))
        for entry in entries
    ]


def _as_json(pairs) -> list[tuple[str, str]]:
    return [(key, json.dumps(value)) for key, value in pairs]


def _flat(config: Row, prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs
