"""Every recipe on the embedded world, under one budget of network evaluations.

Command: python benchmarks/arena.py --recipes=flow_grpo,g2rpo --seeds=42,43,44
What the runs are, and what counts as an evaluation, is in launch/sweeps/arena.py. Runs
that docs/arena.json holds are not made again; the table and the curves are written anew.
A run there that is marked as of an earlier preset is made again once it is taken out.
--sweep=ROOT/XID takes the finished units of a sweep that a launcher made of that file.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from flowgrpo_jax import config as configs
from flowgrpo_jax import train
from flowgrpo_jax.report.charts import Series, chart
from flowgrpo_jax.report.templating import render
from flowgrpo_jax.runtime import metric_names, platform, workdir
from flowgrpo_jax.runtime.metrics import read_metrics
from launch import states, sweep_dir
from launch.sweeps import arena

_RECIPES = flags.DEFINE_list("recipes", arena.ROWS, "Rows that take part.")
_SEEDS = flags.DEFINE_list("seeds", ["42", "43", "44"], "One run each.")
_BUDGET = flags.DEFINE_integer("budget", arena.BUDGET, "Network evaluations of a run.")
_ITERATION = flags.DEFINE_integer(
    "iteration", arena.ITERATION, "And of one iteration, about."
)
_VALUES = flags.DEFINE_string("values", "{}", "JSON: what every run gets beside.")
_SWEEP = flags.DEFINE_string("sweep", None, "ROOT/XID of runs made by a launcher.")
_RESULTS = flags.DEFINE_string("results", "docs/arena.json", "Where runs are kept.")

ACCURACY, DIVERSITY = (
    metric_names.accuracy(metric_names.OVERALL),
    metric_names.monitor("diversity"),
)


def run(recipe: str, seed: int) -> dict:
    """One run; its curve over the budget."""
    config, cost = arena.settle(
        recipe, seed, _BUDGET.value, _ITERATION.value, json.loads(_VALUES.value)
    )
    with tempfile.TemporaryDirectory() as folder:
        assert train.train(config, folder)
        return result(config, cost, folder)


def launched(place: str) -> list[dict]:
    """The results of the finished units in ROOT/XID of launch/sweeps/arena.py."""
    sweep = sweep_dir.read(place)
    found = []
    for state in states.of(sweep):
        if state.is_done:
            folder = sweep.workdir(state.unit)
            config = configs.from_json(workdir.read_config(folder))
            _, cost = arena.settle(config.recipe, config.seed)
            found.append(result(config, cost, folder))
    return found


def result(config, cost: float, folder: str | Path) -> dict:
    """What is kept of a finished run."""
    rows = read_metrics(folder)
    evals = [row for row in rows if row["kind"] == "eval"]
    steps = [row for row in rows if row["kind"] == "train"]
    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "budget": _BUDGET.value,
        "prompts_per_iteration": config.prompts_per_iteration,
        "iterations": config.num_iterations,
        "evaluations_per_iteration": round(cost),
        "evaluations": [round(row["iteration"] * cost) for row in evals],
        "accuracy": [row[ACCURACY] for row in evals],
        "diversity": [row[DIVERSITY] for row in evals],
        "seconds": round(
            sum(row[phase] for row in steps for phase in metric_names.PHASES), 1
        ),
        "occupancy": round(statistics.mean(row["nfe_occupancy"] for row in steps), 3),
    }


def report(results: Sequence[dict], folder: Path) -> None:
    """Write the table and the curves: docs/arena.md, docs/arena.html."""
    images = 521  # held-out prompts, once each
    by_recipe: dict[str, list[dict]] = {}
    for one in results:
        by_recipe.setdefault(one["recipe"], []).append(one)
    base = statistics.mean(one["accuracy"][0] for one in results)
    error = 2 * (2 * base * (1 - base) / images) ** 0.5
    lines = [
        "# Arena: every recipe on the embedded world",
        "",
        "Every row at one learning rate, for some twenty iterations, at equal network "
        "evaluations: a smoke test that rows",
        "learn, not a ranking. Rows stand by family. The claims of their papers, at "
        "equal iterations and with preference",
        "rewards, are not tested here: `iterations x prompts` tells how few prompts "
        "some rows have seen.",
        "",
        "Written by `python benchmarks/arena.py`; the runs are in arena.json. GenEval "
        "accuracy of unguided images",
        f"on {images} held-out prompts, 20 steps, EMA weights where the recipe has "
        "them, which lag behind a learner that",
        f"made some fifty updates. The base scores {100 * base:.1f}. Budget: "
        f"{results[0]['budget']:,} network evaluations a run, training passes",
        "counted three times. `gain` is against the base, with the standard error that "
        "the spread of the seeds gives; two",
        "binomial errors of a difference of two scores, which know nothing of seeds, "
        f"are {100 * error:.1f} points.",
        "",
        "| recipe | accuracy, mean (std) | gain (error) | above 2 binomial errors | "
        "diversity | iterations x prompts | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [name for name in arena.ROWS if name in by_recipe]
    for name in order:
        runs = by_recipe[name]
        last = [100 * one["accuracy"][-1] for one in runs]
        spread = f" ({statistics.stdev(last):.1f})" if len(last) > 1 else ""
        gain = statistics.mean(last) - 100 * base
        if len(runs) > 1:
            gain_error = f" ({statistics.stdev(last) / len(runs) ** 0.5:.1f})"
        else:
            gain_error = ""
        star = "\\*" if any(one.get("earlier_preset") for one in runs) else ""
        needed = 100 * error * ((1 + 1 / len(runs)) / 2) ** 0.5
        diversity = statistics.mean(one["diversity"][-1] for one in runs)
        lines.append(
            f"| {name}{star} | {statistics.mean(last):.1f}{spread} | "
            f"{gain:+.1f}{gain_error} | "
            f"{'yes' if gain > needed else 'no'} | {diversity:.3f} | "
            f"{runs[0]['iterations']} x {runs[0]['prompts_per_iteration']} | "
            f"{statistics.mean(one['seconds'] for one in runs):.0f} | {len(runs)} |"
        )
    if any(one.get("earlier_preset") for one in results):
        lines += [
            "",
            "\\* Measured before the row became what its authors run "
            "(docs/algorithms.md): the last step of dance_grpo and",
            "branch_grpo had noise, awm made two updates with clip 1e-4 and an EMA of "
            ".3, grpo_guard divided by the global std.",
            "All runs of that time are from before an EMA moved at every update while "
            "it is young.",
        ]
    (folder / "arena.md").write_text("\n".join(lines) + "\n")
    curves = []
    for name in order:
        runs = by_recipe[name]
        count = min(len(one["evaluations"]) for one in runs)
        points = [
            (
                runs[0]["evaluations"][k],
                statistics.mean(one["accuracy"][k] for one in runs),
            )
            for k in range(count)
        ]
        curves.append(
            chart(name, [Series("accuracy", points)], "evaluations", percent=True)
        )
    page = render(
        "charts.html.j2", title="Arena: accuracy of every recipe", drawn=curves
    )
    (folder / "arena.html").write_text(page)


def _key(one: dict) -> tuple[str, int, int]:
    return one["recipe"], one["seed"], one["budget"]


def main(_):
    path = Path(_RESULTS.value)
    results = json.loads(path.read_text()) if path.exists() else []
    if _SWEEP.value:
        new = launched(_SWEEP.value)
        made = set(map(_key, new))
        results = [one for one in results if _key(one) not in made] + new
        path.write_text(json.dumps(results, indent=1) + "\n")
        report(results, path.parent)
        return
    done = set(map(_key, results))
    for seed in map(int, _SEEDS.value):
        for recipe in _RECIPES.value:
            if (recipe, seed, _BUDGET.value) in done:
                continue
            results.append(run(recipe, seed))
            path.write_text(json.dumps(results, indent=1) + "\n")
            report(results, path.parent)
            print(json.dumps(results[-1]), flush=True)
    report(results, path.parent)


if __name__ == "__main__":
    platform.configure()
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    app.run(main)
