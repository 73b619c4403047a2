"""report.html: one page about a run, or about several, written from workdirs alone.

It needs config.json and metrics.jsonl, shows what is in samples/, and takes an optional
report.json: {"title", "command", "facts": {name: text}, "notes": [text], "tables":
[{"title", "columns", "rows"}]}. The page is one file that loads nothing; it can be
written at any moment, while a run goes on and after it was killed.

Rows of kind "eval" give the scores; runtime/metric_names.py says what their names mean,
runtime/metric_meanings.py what the metrics do.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report import curves, pictures, scores
from flowgrpo_jax.report.scores import Row, TaskScores
from flowgrpo_jax.report.templating import render
from flowgrpo_jax.report.verdicts import Verdict, verdicts
from flowgrpo_jax.runtime import environment, metric_names, samples
from flowgrpo_jax.runtime.metrics import WANDB_URL, read_metrics
from flowgrpo_jax.runtime.workdir import atomic_write, parse_json, read_config

FILE = "report.html"
_WORSE = 12  # the most prompts that are named
_PROMPT = 160  # characters of a prompt that are shown


@dataclass(frozen=True)
class Story:
    """All that the page tells of one run."""

    name: str
    title: str
    facts: list[str]
    written: str
    finished: bool
    notes: list[str]
    command: str | None
    verdicts: list[Verdict]
    cards: list[scores.Card]
    score_tables: list[tuple[str, list[TaskScores]]]
    tables: list[Row]
    worse: list[tuple[str, str, str, str]]
    worse_of: str
    sheet: pictures.Sheet | None
    groups_of: int | None
    groups: list[pictures.Group]
    small_groups: bool
    links: list[tuple[str, str]]
    made_on: list[tuple[int, list[tuple[str, str]]]]
    config: list[tuple[str, str]]


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html` and returns its path."""
    path = Path(workdir) / FILE
    atomic_write(path, render_page([Path(workdir)], path.parent))
    return path


def render_page(
    workdirs: Sequence[Path], folder: Path, version: str | None = None
) -> str:
    """The page of one run, or of several side by side.

    `folder` is where the page will lie: links are relative to it. With `version` a page
    that is served asks now and then whether there is a newer one.
    """
    runs, told = [], []
    names = _names(workdirs)
    for workdir, name in zip(workdirs, names, strict=True):
        config, rows = read_config(workdir), read_metrics(workdir)
        runs.append(_rows(name, config, rows))
        told.append(_story(workdir, name, config, rows, folder, 1 / len(workdirs)))
    title = told[0].title if len(told) == 1 else f"{len(told)} runs: {', '.join(names)}"
    return render(
        "report.html.j2",
        title=title,
        stories=told,
        data=curves.data(runs),
        differing=_differing(told) if len(told) > 1 else [],
        version=version,
    )


def _names(workdirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their parents as tells them apart."""
    paths = [workdir.absolute() for workdir in workdirs]
    if len(paths) == 1:
        return [paths[0].name]
    common = Path(os.path.commonpath(paths))
    return [
        str(path.relative_to(common)) if path != common else path.name for path in paths
    ]


def _optimised(config: Row) -> list[str]:
    """The rewards with a weight, of evaluations if they have others."""
    settings = config.get("eval")
    own = settings.get("reward") if isinstance(settings, Mapping) else None
    weights = own or config.get("reward")
    if not isinstance(weights, Mapping):
        return []
    return [name for name, weight in weights.items() if weight]


def _rows(name: str, config: Row, rows: Sequence[Row]) -> curves.RunRows:
    train = [row for row in rows if row.get("kind") != "eval"]
    evals = [row for row in rows if row.get("kind") == "eval"]
    return curves.RunRows(name, train, evals, _optimised(config))


def _story(
    workdir: Path,
    name: str,
    config: Row,
    rows: Sequence[Row],
    folder: Path,
    share: float,
) -> Story:
    extra = _read_extra(workdir / "report.json")
    split = _rows(name, config, rows)
    train, evals, rewards = [*split.train], [*split.evals], split.rewards
    place = workdir / "samples"
    first, last = _ends(place)
    of, groups, small = pictures.groups(place, rewards)
    found = verdicts(rows, config)
    by_task = scores.score_table(evals)
    shared = scores.shared_prompts(first, last)
    return Story(
        name=name,
        title=extra.get("title") or f"{config.get('recipe', 'run')} on {name}",
        facts=_facts(config, train),
        written=_last_row(workdir),
        finished=any(one.kind == "finished" for one in found),
        notes=extra.get("notes", []),
        command=extra.get("command"),
        verdicts=found,
        cards=scores.cards(train, evals, rows, rewards, extra),
        score_tables=[
            (title, table)
            for title, table in (
                ("Scores by task", by_task),
                ("Rewards on held-out prompts", scores.reward_table(evals, rewards)),
                (
                    "Held-out reward by tag",
                    [] if by_task else scores.tag_table(first, last),
                ),
            )
            if table
        ],
        tables=extra.get("tables", []),
        worse=_got_worse(shared),
        worse_of=_worse_of(shared),
        sheet=pictures.contact_sheet(place, rewards, share),
        groups_of=of,
        groups=groups,
        small_groups=small,
        links=_links(workdir, folder),
        made_on=_made_on(environment.history(workdir)),
        config=_as_json(_flat(config)),
    )


# -- what changed for single prompts ---------------------------------------------------


def _ends(place: Path) -> tuple[list[Row], list[Row]]:
    """The scores of every prompt at the first and at the last evaluation."""
    names = sorted(path.stem for path in place.glob("iteration_*.json"))
    if len(names) < 2:
        return [], []
    first, last = (samples.read_words(place, name) for name in (names[0], names[-1]))
    return first.get("prompts", []), last.get("prompts", [])


def _got_worse(shared: Sequence[tuple[str, str, float, float]]):
    """(prompt, before, after, change) of those that lost most."""
    lost = sorted((after - before, p, before, after) for _, p, before, after in shared)
    return [
        (
            _short(prompt),
            f"{before:.3g}",
            f"{after:.3g}",
            f"{change:+.3g}".replace("-", "−"),
        )
        for change, prompt, before, after in lost[:_WORSE]
        if change < 0
    ]


def _worse_of(shared: Sequence[tuple[str, str, float, float]]) -> str:
    better = sum(after > before for _, _, before, after in shared)
    worse = sum(after < before for _, _, before, after in shared)
    return (
        f"of {len(shared)} prompts {better} got a higher reward, {worse} a lower one, "
        f"{len(shared) - better - worse} the same"
    )


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT else f"{prompt[:_PROMPT]}…"


# -- facts ------------------------------------------------------------------------------


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
    if not train:
        return facts
    done, wanted = train[-1]["iteration"] + 1, config.get("num_iterations")
    if not isinstance(wanted, int) or wanted <= done:
        return [*facts, f"{done:,} iterations"]
    facts.append(f"{done:,} of {wanted:,} iterations")
    wall = train[-1].get(metric_names.WALL)
    if wall is not None:
        left = scores.duration(wall / done * (wanted - done))
        facts.append(f"about {left} left at this pace")
    return facts


def _last_row(workdir: Path) -> str:
    """When metrics.jsonl was written last, in UTC; "" if it was not."""
    try:
        changed = (workdir / "metrics.jsonl").stat().st_mtime
    except OSError:
        return ""
    moment = datetime.datetime.fromtimestamp(changed, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _links(workdir: Path, folder: Path) -> list[tuple[str, str]]:
    """(name, address) of other things in the workdir, and of the folder's own parts."""
    wanted = {
        "base and tuned side by side": "compare.html",
        "numbers (metrics.jsonl)": "metrics.jsonl",
    }
    grids = sorted((workdir / "samples").glob("iteration_*.png"))
    if grids:
        wanted["latest pictures in full size"] = f"samples/{grids[-1].name}"
    links = [
        (name, os.path.relpath(workdir / file, folder))
        for name, file in wanted.items()
        if (workdir / file).exists()
    ]
    wandb = workdir / WANDB_URL
    url = wandb.read_text().strip() if wandb.exists() else ""
    return [*links, ("wandb", url)] if url.startswith("https://") else links


def _differing(told: Sequence[Story]) -> list[tuple[str, list[str]]]:
    """(key, value in every run) of the config's keys that are not the same in all."""
    configs = [dict(one.config) for one in told]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        (key, values)
        for key in keys
        for values in [[config.get(key, "–") for config in configs]]
        if len(set(values)) > 1
    ]


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
