"""Every recipe on the embedded world, at equal network evaluations: recipes x seeds.

Command: python -m launch.local --config=launch/sweeps/arena.py --root=runs --xid=arena
         python benchmarks/arena.py --sweep=runs/arena    (its table and curves)

A training pass (forward and backward) counts as three evaluations, every fixed policy
that a loss asks as one. Iterations of all recipes cost about the same, so prompts per
iteration differ. What learns is what configs/geneval.py names; the learning rate is
RATE over the updates of an iteration, so that all may move as far.
"""

import ml_collections
import numpy as np

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.config import recipes
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.rl.objectives.table import OBJECTIVES

ROWS = [name for name in recipes.RECIPES if name != "pretrain"]
SEEDS = (42, 43, 44)
BUDGET = 75_000  # network evaluations of a run
ITERATION = 3_000  # and of one iteration, about
RATE = 4e-4  # learning rate times updates of an iteration
BACKWARD = 3  # a forward and a backward pass, in forward passes
EVALUATIONS = 3  # during a run, the last one included


def sweep(hyper):
    return hyper.product(
        [hyper.sweep("config.seed", SEEDS), hyper.sweep("config:recipe", ROWS)]
    )


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    recipe = configs.parse_argument(arg).get("recipe", "flow_grpo")
    return settle(recipe)[0]


def config_of(
    recipe: str,
    seed: int = SEEDS[0],
    prompts: int = 2,
    iterations: int = 1,
    values: dict | None = None,
) -> ml_collections.ConfigDict:
    """The embedded world's task with the row of a recipe, and `values` beside it."""
    row = recipes.recipe(recipe).values
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
        by_recipe={recipe: values or {}},
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


def price(config: ml_collections.ConfigDict) -> tuple[float, float]:
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


def settle(
    recipe: str,
    seed: int = SEEDS[0],
    budget: int = BUDGET,
    iteration: int = ITERATION,
    values: dict | None = None,
) -> tuple[ml_collections.ConfigDict, float]:
    """(config, evaluations of an iteration) that fit the budget."""
    updates = config_of(recipe, seed, values=values).updates_per_iteration
    per_prompt, _ = price(config_of(recipe, seed, updates, values=values))
    prompts = max(1, round(iteration / per_prompt / updates)) * updates
    iterations = max(EVALUATIONS, round(budget / (prompts * per_prompt)))
    config = config_of(recipe, seed, prompts, iterations, values)
    return config, prompts * per_prompt
