"""Every recipe on the embedded world, under one budget of network evaluations.

Command: python benchmarks/arena.py --recipes=flow_grpo,g2rpo --seeds=42,43,44
A training pass (forward and backward) counts as three evaluations, every fixed policy
that a loss asks as one. Iterations of all recipes cost about the same, so prompts per
iteration differ. What learns is what configs/geneval.py names; the learning rate is
RATE over the updates of an iteration, so that all may move as far. Runs that
docs/arena.json holds are not made again; the table and the curves are written anew. A
run there that is marked as of an earlier preset is made again once it is taken out.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from flowgrpo_jax import assemble, train
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import recipes
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.report.charts import Series, chart
from flowgrpo_jax.report.templating import render
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from flowgrpo_jax.runtime import metric_names, platform
from flowgrpo_jax.runtime.metrics import read_metrics

ROWS = [name for name in recipes.RECIPES if name != "pretrain"]
_RECIPES = flags.DEFINE_list("recipes", ROWS, "Rows that take part.")
_SEEDS = flags.DEFINE_list("seeds", ["42", "43", "44"], "One run each.")
_BUDGET = flags.DEFINE_integer("budget", 75_000, "Network evaluations of a run.")
_ITERATION = flags.DEFINE_integer("iteration", 3_000, "And of one iteration, about.")
_VALUES = flags.DEFINE_string("values", "{}", "JSON: what every run gets beside.")
_RESULTS = flags.DEFINE_string("results", "docs/arena.json", "Where runs are kept.")

ACCURACY, DIVERSITY = (
    metric_names.accuracy(metric_names.OVERALL),
    metric_names.monitor("diversity"),
)
RATE = 4e-4  # learning rate times updates of an iteration
BACKWARD = 3  # a forward and a backward pass, in forward passes
EVALUATIONS = 3  # during a run, the last one included


def config_of(recipe: str, seed: int, prompts: int = 2, iterations: int = 1):
    """The embedded world's task with the row of a recipe."""
    row = recipes.RECIPES[recipe].values
    updates = row.get("updates_per_iteration", configs.base().updates_per_iteration)
    if row.get("train.update_order") == "steps":
        updates *= len(row["sample.branch_steps"])
    return configs.make(
        recipe=recipe,
        task={
            "group_size": 16,
            "sample.guidance_scale": 1.0,
            "reward_options": {"geneval": {"extra_object_penalty": 0.35}},
            "train.use_lora": False,
            "train.parameters": "add_|context|time_text",
            "train.learning_rate": RATE / updates,
            "train.adam_eps": 1e-10,
            "train.weight_decay": 0.0,
        },
        by_recipe={recipe: json.loads(_VALUES.value)},
        seed=seed,
        num_iterations=iterations,
        prompts_per_iteration=prompts,
        checkpoint__every=10_000,
        log__tensorboard=False,
        eval__guidance_scale=1.0,
        eval__images_per_task=50,
        eval__every=max(1, iterations // EVALUATIONS),
        eval__sde=False,
        sample__eval_num_steps=20,
    )


def price(config) -> tuple[float, float]:
    """(network evaluations, trained passes) of an iteration, per prompt."""
    planner = Planner(specs.plan_spec(config), devices=1)
    jobs = planner.jobs(0)
    packed = planner.pack(jobs)
    plans = [job.plan for job in jobs]
    rollout = sum(len(made.evaluated) for made in plans)
    objective = OBJECTIVES[config.train.objective]
    if objective.consumes == "transitions":
        edges = np.ones(sum(len(made.trained) for made in plans))
        update_batch = credit.batch_of_actions(
            specs.update_spec(config), jobs, packed, edges, 1
        )
        passes = update_batch.weight.any(-1).sum()
    else:
        rewards = np.tile(np.arange(config.group_size, dtype=float), (len(jobs), 1))
        update_batch = credit.batch_of_samples(
            specs.update_spec(config), packed, rewards, rewards, objective.grouping, 1
        )
        passes = update_batch.weight.sum()
    asked = assemble.fixed_policies(config) - {"old_velocity"}
    each = BACKWARD + len(asked)
    return (rollout + passes * each) / len(jobs), passes / len(jobs)


def settle(recipe: str, seed: int):
    """(config, evaluations of an iteration) that fit the budget."""
    updates = config_of(recipe, seed).updates_per_iteration
    per_prompt, _ = price(config_of(recipe, seed, prompts=updates))
    prompts = max(1, round(_ITERATION.value / per_prompt / updates)) * updates
    iterations = max(EVALUATIONS, round(_BUDGET.value / (prompts * per_prompt)))
    return config_of(recipe, seed, prompts, iterations), prompts * per_prompt


def run(recipe: str, seed: int) -> dict:
    """One run; its curve over the budget."""
    config, cost = settle(recipe, seed)
    with tempfile.TemporaryDirectory() as folder:
        assert train.train(config, folder)
        rows = read_metrics(folder)
    evals = [row for row in rows if row["kind"] == "eval"]
    steps = [row for row in rows if row["kind"] == "train"]
    return {
        "recipe": recipe,
        "seed": seed,
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
    order = [name for name in ROWS if name in by_recipe]
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


def main(_):
    path = Path(_RESULTS.value)
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(one["recipe"], one["seed"], one["budget"]) for one in results}
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
