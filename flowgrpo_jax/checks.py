"""What must hold for a config before a run begins."""

import math
import re
from collections.abc import Iterable

import ml_collections

from flowgrpo_jax import config as configs
from flowgrpo_jax import recipes
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.models import mmdit_config
from flowgrpo_jax.rewards import registry, scoring
from flowgrpo_jax.rl import advantage, losses

_WINDOWS = ("window", "random_window", "progressive_window")
PLANS = ("all", "subset", *_WINDOWS, "branch", "tree", "ode")
_CHOICES: dict[str, Iterable[str]] = {
    "recipe": recipes.RECIPES,
    "dtype": ("float32", "bfloat16"),
    "remat": mmdit_config.REMAT,
    "reward_failure": scoring.FAILURES,
    "sample.plan": PLANS,
    "sample.schedule": schedule.SCHEDULES,
    "sample.sde_type": [kind for kind in transition.TRANSITIONS if kind != "ode"],
    "sample.init_noise": ("independent", "shared", "correlated"),
    "train.objective": losses.OBJECTIVES,
    "train.update_order": ("chunks", "steps"),
    "train.optimizer": ("adamw", "muon"),
    "train.advantage_std": advantage.STDS,
    "train.advantage_key": ("prompt", "step", "anchor"),
    "train.advantage_centre": advantage.CENTRES,
    "train.backup": advantage.BACKUPS,
    "train.reward_combination": advantage.COMBINES,
    "train.step_weight": ("none", "std"),
    "train.select": ("all", "best"),
    "train.behaviour": ("learner", "ema", "copy", "frozen"),
    "train.kl_form": ("official", "paper", "velocity"),
    "train.kl_reference": ("frozen", "ema", "guided"),
}
# Key -> least value, and the largest one where there is one.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # larger ones would repeat the noise of smaller ones
    "num_iterations": (0, math.inf),
    "resolution": (0, math.inf),
    "max_sequence_length": (1, 512),
    "prompts_per_iteration": (1, math.inf),
    "group_size": (1, math.inf),
    "updates_per_iteration": (1, math.inf),
    "microbatch": (1, math.inf),
    "reward_deadline": (0, math.inf),
    "reward_batches": (1, math.inf),
    "sample.noise_correlation": (0, 1),
    "sample.window_every": (1, math.inf),
    "sample.window_decay": (0, math.inf),
    "sample.finish_ratio": (0, 1),
    "sample.branch_anchors": (1, math.inf),
    "sample.fanout": (2, math.inf),
    "sample.probe_steps": (0, math.inf),
    "sample.num_steps": (1, math.inf),
    "sample.eval_num_steps": (1, math.inf),
    "sample.guidance_scale": (0, math.inf),
    "sample.noise_level": (0, math.inf),
    "sample.shift": (0, math.inf),
    "train.learning_rate": (0, math.inf),
    "train.warmup_iterations": (0, math.inf),
    "train.decay_iterations": (0, math.inf),
    "train.weight_decay": (0, math.inf),
    "train.adam_eps": (0, math.inf),
    "train.max_grad_norm": (0, math.inf),
    "train.beta": (0, math.inf),
    "train.clip_range": (0, math.inf),
    "train.clip_range_high": (0, math.inf),
    "train.advantage_ddof": (0, 1),
    "train.advantage_eps": (0, math.inf),
    "train.draws": (1, math.inf),
    "train.behaviour_every": (1, math.inf),
    "train.kl_floor": (0, 1),
    "train.ema_beta": (0, math.inf),
    "train.norm_hinge": (0, math.inf),
    "train.adv_clip_max": (0, math.inf),
    "train.timestep_fraction": (0, 1),
    "train.lora_rank": (1, math.inf),
    "train.ema_decay": (0, 1),
    "train.ema_every": (1, math.inf),
    "train.caption_dropout": (0, 1),
    "eval.every": (0, math.inf),
    "eval.images_per_task": (1, math.inf),
    "eval.final_images_per_task": (1, math.inf),
    "eval.guidance_scale": (0, math.inf),
    "eval.monitor_threshold": (0, math.inf),
    "eval.seed": (0, 2**32 - 1),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "log.every": (1, math.inf),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError (key, value, what is allowed) for a config that cannot run."""
    for key, choices in _CHOICES.items():
        if configs.get(config, key) not in choices:
            raise configs.not_one_of(key, configs.get(config, key), choices)
    for key, (least, most) in _RANGES.items():
        value = configs.get(config, key)
        if not (least <= value <= most and math.isfinite(value)):
            allowed = f"at least {least}" + (
                f", at most {most}" if most < math.inf else ""
            )
            raise UserError(f"{key}: {value}: must be {allowed}")
    for key, weights in (
        ("reward", config.reward),
        ("eval.reward", config.eval.reward),
    ):
        for name in weights:
            if not registry.is_known(name, config.reward_options.get(name, ())):
                raise configs.not_one_of(key, name, registry.REWARDS)
    if not any(config.reward.values()):
        raise UserError(f"reward: {config.reward.to_dict()}: one weight must not be 0")
    policy = config.train.objective != "flow_matching"
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
    _check_axes(config)
    try:
        re.compile(config.train.parameters)
    except re.error as error:
        raise UserError(
            f"train.parameters: {config.train.parameters}: must be a regular "
            f"expression: {error}"
        ) from error
    window = config.sample.sde_window_range
    if len(window) != 2 or not all(isinstance(step, int) for step in window):
        raise UserError(
            f"sample.sde_window_range: {window}: must be two step numbers, as in (0, 5)"
        )


def _check_axes(config: ml_collections.ConfigDict) -> None:
    """Combinations of axes that cannot be, however good each of them is."""
    sample, train = config.sample, config.train
    if train.objective == "flow_matching":
        return
    samples = losses.OBJECTIVES[train.objective].consumes == "samples"
    if sample.plan in ("branch", "tree") and sample.init_noise != "shared":
        raise UserError(
            f"sample.init_noise: {sample.init_noise}: must be shared, since the "
            f"plan {sample.plan} goes to its stochastic step once for a whole group"
        )
    if samples and (sample.plan in ("branch", "tree") or sample.probe_steps):
        raise UserError(
            f"sample.plan: {sample.plan}: train.objective {train.objective} learns "
            "from whole images, one per member: take ode or all, without probe_steps"
        )
    if not samples and sample.plan == "ode":
        raise UserError(
            f"sample.plan: ode: train.objective {train.objective} learns from "
            "stochastic steps, and the ODE has none: take all or a window"
        )
    if sample.sde_type == "cps" and train.objective in ("guard", "dppo"):
        raise UserError(
            f"sample.sde_type: cps: its log-prob has no scale, which train.objective "
            f"{train.objective} needs: take cps_gaussian"
        )
    if samples and train.update_order == "steps":
        raise UserError(
            f"train.update_order: steps: train.objective {train.objective} has no "
            "steps: take chunks"
        )
    if (train.backup == "difference") != bool(sample.probe_steps):
        raise UserError(
            f"train.backup: {train.backup}: difference and sample.probe_steps "
            f"({sample.probe_steps}) go together"
        )
    if sample.finish_ratio and sample.plan not in _WINDOWS:
        raise UserError(
            f"sample.finish_ratio: {sample.finish_ratio}: the plan {sample.plan} has no "
            f"window to finish after: take one of {', '.join(_WINDOWS)}"
        )
    levels = tuple(sample.noise_levels)
    if levels and len(levels) != sample.num_steps:
        raise UserError(
            f"sample.noise_levels: {levels}: must be one for each of the "
            f"{sample.num_steps} steps"
        )
