"""Names with markup in them: none may reach a page as it is."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.attacks.table import Row, row
from flowgrpo_jax import compare
from flowgrpo_jax import config as configs
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.report.page import write_report
from flowgrpo_jax.runtime import metric_names

MARK = "<b>x</b>"
_NAMES = {
    "tag": metric_names.accuracy(MARK),
    "reward": metric_names.reward(MARK, metric_names.GUIDED),
    "monitor": metric_names.monitor(MARK),
    "unguided": metric_names.monitor(MARK, metric_names.UNGUIDED),
}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [*_report(Path(folder) / MARK.replace("/", "")), *_compare()]
    yield row(
        f"`{MARK}` in prompts, tags, reward names, config, command, title, notes",
        outcomes,
        "escaped in report.html and compare.html",
    )


def _raw(page: str, where: str) -> str | None:
    return f"{where}: as it is" if MARK in page or "<b>x" in page else None


def _report(workdir: Path) -> Iterator[str | None]:
    """One page for every place that a name may stand in, with all else clean."""
    (workdir / "samples").mkdir(parents=True)
    config = configs.make().to_dict()
    score = {
        metric_names.accuracy(task): 0.5 for task in (metric_names.OVERALL, "single")
    }

    def page(config, evals, train, extra) -> str:
        lines = [
            {"iteration": 0, "kind": "eval"} | evals,
            {"iteration": 0, "kind": "train", metric_names.REWARD_AVERAGE: 0.1} | train,
            {"iteration": 1, "kind": "eval"} | evals,
        ]
        (workdir / "config.json").write_text(json.dumps(config))
        (workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        (workdir / "report.json").write_text(json.dumps(extra))
        return write_report(workdir).read_text()

    for where, name in _NAMES.items():
        yield _raw(page(config, score | {name: 0.5}, {}, {}), where)
    yield _raw(
        page(config, score, {metric_names.reward(MARK): 0.5}, {}), "training reward"
    )
    for key in ("recipe", "model", "prompts"):
        yield _raw(page(config | {key: MARK}, score, {}, {}), key)
    rewards = config | {"reward": {MARK: 1.0}}
    yield _raw(page(rewards, score, {}, {}), "config")
    table = {"title": MARK, "columns": [MARK], "rows": [[MARK]]}
    for extra in (
        {"command": MARK},
        {"title": MARK},
        {"notes": [MARK]},
        {"tables": [table]},
        {"facts": {MARK: MARK}},
    ):
        yield _raw(page(config, score, {}, extra), next(iter(extra)))


def _compare() -> Iterator[str | None]:
    side = (
        np.zeros((1, 1, 8, 8, 3), np.float32),
        {MARK: np.zeros((1, 1)), "avg": np.zeros((1, 1))},
    )
    for where, name, prompt, fact in (
        ("prompt", "run", MARK, "a"),
        ("workdir", MARK, "a", "a"),
        ("reward", "run", "a", "a"),
        ("command", "run", "a", MARK),
    ):
        made = compare.page(name, [fact], [Prompt(prompt)], side, side, "report.html")
        yield _raw(made, f"compare: {where}")
