"""One table: algorithm -> its value on every axis.

A row is a set of config values; a config file starts from a row and changes what its
task needs, the command line has the last word. Adding an algorithm is adding a row
(and, where it needs one, a new value of an axis in flow/ or rl/).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowgrpo_jax.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """An algorithm: its paper, when to take it, and its values of the config keys."""

    paper: str
    when: str
    values: Mapping[str, Any]


RECIPES: dict[str, Recipe] = {
    "flow_grpo": Recipe(
        paper="Flow-GRPO, arXiv 2505.05470",
        when="the reference: every step stochastic, KL to the frozen model",
        values={
            "sample.plan": "all",
            "sample.sde_type": "sde",
            "sample.noise_level": 0.7,
            "sample.init_noise": "independent",
            "train.objective": "clipped_policy",
            "train.timestep_fraction": 0.99,
            "train.advantage_std": "global",
            "train.clip_range": 1e-4,
            "train.beta": 0.04,
            "train.kl_form": "official",
        },
    ),
    "flow_grpo_fast": Recipe(
        paper="Flow-GRPO-Fast (authors' release of 2025-10), arXiv 2505.05470",
        when="a few stochastic steps among the first ones: most of the gain, less cost",
        values={
            "sample.plan": "random_window",
            "sample.sde_type": "sde",
            "sample.noise_level": 0.7,
            "sample.init_noise": "independent",
            "sample.sde_window_size": 2,
            "sample.sde_window_range": (0, 5),
            "train.objective": "clipped_policy",
            "train.advantage_std": "global",
            "train.clip_range": 1e-5,
            "train.beta": 0.0,
            "train.kl_form": "official",
        },
    ),
    "flow_grpo_fast_v1": Recipe(
        paper="Flow-GRPO-Fast (authors' release of 2025-07), arXiv 2505.05470",
        when="little compute: a group shares the way to one stochastic step, and the "
        "network's price there; the default of the embedded model",
        values={
            "sample.plan": "branch",
            "sample.sde_type": "sde",
            "sample.noise_level": 0.7,
            "sample.init_noise": "shared",
            "sample.sde_window_range": (1, 6),
            "train.objective": "clipped_policy",
            "train.advantage_std": "global",
            "train.clip_range": 1e-4,
            # Ten times Flow-GRPO's: less lets free colours narrow (docs/results.md).
            "train.beta": 0.4,
            "train.kl_form": "official",
        },
    ),
    "pretrain": Recipe(
        paper="rectified flow, arXiv 2403.03206",
        when="to make a base model from captioned scenes; no reward",
        values={
            "train.objective": "flow_matching",
            "train.optimizer": "muon",
            "train.trains_text": True,
            "train.use_lora": False,
            "updates_per_iteration": 1,
        },
    ),
}


def recipe(name: str) -> Recipe:
    """The row of that name; UserError with all names otherwise."""
    if name not in RECIPES:
        raise UserError(f"recipe: {name}: must be one of {', '.join(RECIPES)}")
    return RECIPES[name]


def describe() -> str:
    """All rows, one line each, for --list_recipes."""
    width = max(map(len, RECIPES))
    return "\n".join(
        f"{name:<{width}}  {row.when}  [{row.paper}]" for name, row in RECIPES.items()
    )
