"""The config: every key with its default, built from a recipe, checked before a run."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from flowgrpo_jax import recipes
from flowgrpo_jax.errors import UserError

# Keys that a resumed run may change: they do not shape what was already computed.
MAY_DIFFER = frozenset({"num_iterations", "mesh", "checkpoint", "log"})


def base() -> ml_collections.ConfigDict:
    """Every key of every config, with its default and its meaning."""
    c = ml_collections.ConfigDict
    return c(
        {
            "seed": 42,
            "model": "sprites",  # embedded model, weights file or diffusers folder
            "recipe": "flow_grpo",  # row of recipes.py; choose with file.py:recipe=...
            "prompts": "sprites",  # prompt set, .txt or .jsonl for training
            "reward": c({"geneval": 1.0}),  # name -> weight
            "reward_options": c(),  # name -> keyword arguments
            "num_iterations": 400,
            "prompts_per_iteration": 48,
            "group_size": 24,  # images per prompt
            "updates_per_iteration": 2,  # optimizer steps per rollout
            "microbatch": 8,  # images that go through the network at once
            "dtype": "float32",  # of matmuls and residuals; or bfloat16
            "mesh": c({"data": -1, "fsdp": 1}),
            "sample": c(
                {
                    "plan": "all",  # all | window | random_window | branch
                    "num_steps": 10,
                    "eval_num_steps": 40,
                    "schedule": "sd3",  # linear | shifted | sd3 | flux
                    "shift": 3.0,
                    "guidance_scale": 4.5,  # 1 = no guidance
                    "noise_level": 0.7,
                    "sde_type": "sde",  # sde | cps | dance
                    "init_noise": "independent",  # or shared within a group
                    "sde_window_size": 2,
                    "sde_window_range": (0, 5),  # steps that a window may hold
                }
            ),
            "train": c(
                {
                    "objective": "clipped_policy",  # or flow_matching
                    "optimizer": "adamw",  # or muon
                    "learning_rate": 3e-4,
                    "warmup_iterations": 0,
                    "decay_iterations": 0,  # linear decay to 0 over the last ones
                    "weight_decay": 1e-4,
                    "adam_eps": 1e-8,
                    "max_grad_norm": 1.0,
                    "clip_range": 1e-4,
                    "adv_clip_max": 5.0,
                    "advantage_std": "global",  # global | group | none
                    "beta": 0.04,  # weight of the KL to the frozen reference
                    "kl_form": "official",  # official | paper | velocity
                    "timestep_fraction": 0.99,  # plan "all": first part is trained
                    "use_lora": True,
                    "lora_rank": 32,
                    "lora_alpha": 64.0,
                    "ema": True,  # evaluate and export the EMA
                    "ema_decay": 0.9,
                    "ema_every": 8,  # optimizer steps
                    "trains_text": False,
                    "caption_noise": c(),  # pretraining: task -> share of wrong captions
                    "clean_iterations": 0,  # before caption_noise begins
                    "caption_dropout": 0.1,
                }
            ),
            "eval": c(
                {
                    "every": 50,  # iterations; also at the start and the end
                    "prompts": "sprites",  # prompt set (its test split) or a file
                    "images_per_task": 48,  # during training
                    "final_images_per_task": 100,  # at the start and the end, and
                    # there every held-out prompt at least once
                    "guidance_scale": 4.5,
                    "seed": 0,
                }
            ),
            "checkpoint": c({"every": 50, "keep": 2}),
            "log": c(
                {"every": 1, "images_every": 50, "wandb": "", "tensorboard": True}
            ),
        }
    )


def make(
    arg: str | None = None, recipe: str = "flow_grpo", **values: Any
) -> ml_collections.ConfigDict:
    """Defaults, then the recipe's row, then `values` (dotted with `__`), then `arg`.

    `arg` is what follows the colon of --config=file.py:..., as `key=value,key=value`
    with top-level keys (model, recipe, ...).
    """
    chosen = parse_argument(arg)
    config = base()
    config.recipe = chosen.pop("recipe", recipe)
    for key, value in recipes.recipe(config.recipe).values.items():
        _assign(config, key, value)
    for key, value in values.items():
        _assign(config, key.replace("__", "."), value)
    for key, value in chosen.items():
        _assign(config, key, value)
    return config


def parse_argument(arg: str | None) -> dict[str, str]:
    """`model=x,recipe=y` to a dict; UserError for anything else."""
    pairs = {}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f"config argument: {part}: must look like recipe=flow_grpo")
        pairs[key] = value
    return pairs


def _assign(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    if last not in node:
        raise UserError(f"{key}: unknown config key; allowed here: {', '.join(node)}")
    if isinstance(value, Mapping):
        node[last] = ml_collections.ConfigDict(dict(value))
        return
    if isinstance(value, str) and not isinstance(node[last], str):
        raise UserError(f"{key}: {value!r}: set it with --config.{key}=... instead")
    node[last] = value


_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "sample.plan": ("all", "window", "random_window", "branch"),
    "sample.sde_type": ("sde", "cps", "dance"),
    "sample.init_noise": ("independent", "shared"),
    "train.objective": ("clipped_policy", "flow_matching"),
    "train.optimizer": ("adamw", "muon"),
    "train.advantage_std": ("global", "group", "none"),
    "train.kl_form": ("official", "paper", "velocity"),
}
_AT_LEAST = {
    "num_iterations": 0,
    "prompts_per_iteration": 1,
    "group_size": 1,
    "updates_per_iteration": 1,
    "microbatch": 1,
    "sample.num_steps": 1,
    "sample.eval_num_steps": 1,
    "sample.guidance_scale": 0,
    "sample.noise_level": 0,
    "train.learning_rate": 0,
    "train.beta": 0,
    "train.clip_range": 0,
    "train.lora_rank": 1,
    "eval.every": 0,
    "eval.images_per_task": 1,
    "eval.final_images_per_task": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError (key, value, what is allowed) for a config that cannot run."""
    flat = dict(_flatten(config.to_dict()))
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(f"{key}: {flat[key]}: must be one of {', '.join(allowed)}")
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{key}: {flat[key]}: must be at least {least}")
    policy = config.train.objective == "clipped_policy"
    if policy and config.group_size < 2:
        raise UserError(
            f"group_size: {config.group_size}: must be at least 2: an advantage "
            "compares the images of one prompt"
        )
    if config.prompts_per_iteration % config.updates_per_iteration:
        raise UserError(
            f"updates_per_iteration: {config.updates_per_iteration}: must divide "
            f"prompts_per_iteration ({config.prompts_per_iteration})"
        )


def _flatten(config: Mapping, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
