"""What every key of the config may hold, whoever set it: a flag, a file or a workdir.

One rule a key; a key of `config.base` without one fails a test. What keys must be
together is in `checks`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from flowgrpo_jax.config import keys, recipes, rules
from flowgrpo_jax.config.rules import (
    LARGEST,
    Rule,
    anything,
    flag,
    number,
    one_of,
    regex,
    row,
    table,
    text,
    whole,
)
from flowgrpo_jax.errors import UserError, shown
from flowgrpo_jax.flow import schedule, transition
from flowgrpo_jax.models import remat
from flowgrpo_jax.rewards import scoring
from flowgrpo_jax.rl import advantage
from flowgrpo_jax.rl.objectives import options as option_fields
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from flowgrpo_jax.rl.regularizer import KL_FORMS, REFERENCES
from flowgrpo_jax.rl.step_weight import STEP_WEIGHTS
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import resolution

WINDOWS = ("window", "random_window", "progressive_window")
PLANS = ("all", "subset", *WINDOWS, "branch", "tree", "ode")
_SEED = whole(0, 2**32 - 1)  # larger ones would repeat the noise of smaller ones
_STEPS = whole(1, 1000)
_SHARE = number(0, 1)
_WEIGHTS = table(text("a reward's name", empty=False), number(-LARGEST))


def _axis(size: Any) -> rules.Fault | None:
    fault = whole(-1, 1_000_000)(size)
    if fault or size:
        return fault
    return rules.Fault("", size, "at least 1, or -1 for all the rest")


def _mesh(values: Any) -> rules.Fault | None:
    if fault := table(one_of((*meshes.AXES, "exact")), anything)(values):
        return fault
    for name, value in values.items():
        if fault := (flag if name == "exact" else _axis)(value):
            return fault._replace(where=f".{name}")
    return None


def _ramp(values: Any) -> rules.Fault | None:
    what = "four numbers: first, rate, start, most"
    if fault := row(number(0), what, least=4, most=4)(values):
        return fault
    # A share of 1 never follows the learner: that is the behaviour `frozen`.
    each = (_SHARE, number(0), whole(0), number(0, 1, below=True))
    for index, (rule, value) in enumerate(zip(each, values, strict=True)):
        if fault := rule(value):
            return fault._replace(where=f"[{index}]")
    return None


def _target(pattern: Any) -> rules.Fault | None:
    """It stands within a larger expression, where flags such as (?i) may not."""
    fault = regex(pattern) or regex(f"(.*\\.)?({pattern})")
    return fault and fault._replace(value=pattern)


def _resolution(value: Any) -> rules.Fault | None:
    try:
        resolution.parse(value)
    except ValueError:
        return rules.Fault("", value, resolution.WANTED)
    return None


RULES: dict[str, Rule] = {
    "seed": _SEED,
    "model": text("a model: sprites, words, a folder or a hub id", empty=False),
    "model_path": text(),
    "transformer_path": text(),
    "resolution": _resolution,
    "max_sequence_length": whole(1, 512),
    "negative_prompt": text(),
    "embedding_cache": text("a folder", empty=False),
    "recipe": one_of(recipes.RECIPES),
    "prompts": text("a prompt set, or a .txt or .jsonl file", empty=False),
    "reward": _WEIGHTS,
    "reward_options": table(
        text("a reward's name", empty=False), table(text("an option"), anything)
    ),
    "monitors": row(text("a monitor's name", empty=False), "names of monitors"),
    "reward_deadline": number(0, above=True),
    "reward_failure": one_of(scoring.FAILURES),
    "reward_batches": whole(1),
    "num_iterations": whole(0),
    "prompts_per_iteration": whole(1, 100_000),
    "group_size": whole(1, 100_000),
    "updates_per_iteration": whole(1, 100_000),
    "microbatch": whole(1, 100_000),
    "dtype": one_of(("float32", "bfloat16")),
    "remat": one_of(remat.POLICIES),
    "mesh": _mesh,
    "sample.plan": one_of(PLANS),
    "sample.num_steps": _STEPS,
    "sample.eval_num_steps": _STEPS,
    "sample.schedule": one_of(schedule.SCHEDULES),
    "sample.shift": number(0, 1000),
    "sample.guidance_scale": number(0, 1000),
    "sample.noise_level": number(0, 1000),
    "sample.noise_levels": row(number(0, 1000), "noise levels, one a step, or none"),
    "sample.sde_type": one_of(
        [kind for kind in transition.TRANSITIONS if kind != "ode"]
    ),
    "sample.init_noise": one_of(("independent", "shared", "correlated")),
    "sample.noise_correlation": _SHARE,
    "sample.sde_window_size": _STEPS,
    "sample.sde_window_range": row(
        whole(0, 1000), "two step numbers, as in (0, 5)", least=2, most=2
    ),
    "sample.window_every": whole(1),
    "sample.window_decay": number(0),
    "sample.finish_ratio": _SHARE,
    "sample.branch_steps": row(
        whole(0, 999), "step numbers, as in (0, 1, 2), or none", rising=True
    ),
    "sample.branch_anchors": whole(1, 10_000),
    "sample.merge_steps": row(_STEPS, "numbers of sigmas, one a branch step, or none"),
    "sample.granularities": row(
        _STEPS, "whole numbers, as in (1, 2, 3)", least=1, distinct=True
    ),
    "sample.whole_anchor": flag,
    "sample.fanout": whole(2, 1000),
    "sample.probe_steps": whole(0, 1000),
    "train.objective": one_of(OBJECTIVES),
    # What their names may be depends on the objective: see `_check_objective`.
    "train.objective_options": table(text("an option"), anything),
    "train.optimizer": one_of(("adamw", "muon")),
    "train.learning_rate": number(0, above=True),
    "train.warmup_iterations": whole(0),
    "train.decay_iterations": whole(0),
    "train.weight_decay": number(0),
    "train.adam_eps": number(0, above=True),
    "train.max_grad_norm": number(0),
    "train.update_order": one_of(("chunks", "steps")),
    "train.guidance_scale": number(0, 1000),
    "train.clip_range": _SHARE,  # above 1 the ratio would have to be negative
    "train.clip_range_high": number(0),
    "train.adv_clip_max": number(0, above=True),
    "train.advantage_std": one_of(advantage.STDS),
    "train.advantage_key": one_of(("prompt", "step", "anchor")),
    "train.advantage_centre": one_of(advantage.CENTRES),
    "train.advantage_ddof": whole(0, 1),
    "train.advantage_eps": number(0),
    "train.zero_advantage": one_of(("drop", "count")),
    "train.backup": one_of(advantage.BACKUPS),
    "train.reward_combination": one_of(advantage.COMBINES),
    "train.step_weight": one_of(STEP_WEIGHTS),
    "train.draws": whole(1, 10_000),
    "train.select": one_of(("all", "best")),
    "train.behaviour": one_of(
        ("learner", "ema", "copy", "frozen", "learner_beside_ema")
    ),
    "train.behaviour_ramp": _ramp,
    "train.behaviour_every": whole(1),
    "train.beta": number(0),
    "train.kl_form": one_of(KL_FORMS),
    "train.kl_reference": one_of(REFERENCES),
    "train.kl_guidance_scale": number(0, 1000),
    "train.kl_floor": _SHARE,
    "train.ema_beta": number(0),
    "train.norm_hinge": number(0),
    "train.timestep_fraction": number(0, 1, above=True),
    "train.parameters": regex,
    "train.use_lora": flag,
    "train.lora_rank": whole(1, 100_000),
    "train.lora_alpha": number(0, above=True),
    "train.lora_targets": row(_target, "regular expressions, at least one", least=1),
    "train.lora_path": text(),
    "train.ema": flag,
    "train.ema_decay": number(0, 1, below=True),  # with 1 it would never move
    "train.ema_every": whole(1),
    "train.trains_text": flag,
    "train.caption_noise": table(text("a task's name", empty=False), _SHARE),
    "train.clean_iterations": whole(0),
    "train.caption_dropout": number(0, 1, below=True),
    "eval.every": whole(0),
    "eval.prompts": text("a prompt set, or a .txt or .jsonl file", empty=False),
    "eval.reward": _WEIGHTS,
    "eval.images_per_task": whole(1, 1_000_000),
    "eval.final_images_per_task": whole(1, 1_000_000),
    "eval.guidance_scale": number(0, 1000),
    "eval.monitor_threshold": number(0),
    "eval.sde": flag,
    "eval.seed": _SEED,
    "checkpoint.every": whole(1),
    "checkpoint.minutes": number(0),
    "checkpoint.keep": whole(1),
    "log.every": whole(1),
    "log.wandb": text(),
    "log.tensorboard": flag,
}
# Flags of the commands; many stand in for a key, and are to be named themselves.
FLAGS: dict[str, Rule] = {
    "seed": _SEED,
    "num_steps": _STEPS,
    "guidance_scale": RULES["eval.guidance_scale"],
    "negative_prompt": RULES["negative_prompt"],
    "model": RULES["model"],
    "prompts": RULES["prompts"],
    "prompts_file": text("a .txt or .jsonl file", empty=False),
    "workdir": text("the folder of a run", empty=False),
    "output": text("a file or folder", empty=False),
    "checkpoint": whole(0),
    "num_images": whole(1, 100_000),
    "max_prompts": whole(1),
    "budget": whole(1),
    "judged_steps": _STEPS,
    "keep": number(0, 1, above=True),
}


def check_flag(name: str, value: Any) -> None:
    """UserError that names the flag for a value that it cannot have; None was not given.

    A list has the values of a flag that may be given several times.
    """
    if value is not None and name in FLAGS:
        for one in value if isinstance(value, list) else [value]:
            _apply(FLAGS[name], f"--{name}", one)


def check(config: ml_collections.ConfigDict) -> None:
    """UserError for a key that is not ours, is missing or holds what it cannot.

    A user's get_config may have made the config of anything.
    """
    try:
        held = config.to_dict()
    except Exception as error:  # a placeholder without its value, a field of a set
        raise UserError(
            f"--config: {type(error).__name__}: {error}: every key must have a value"
        ) from error
    _check_keys(config, held, keys.base().to_dict(), "")
    for key, rule in RULES.items():
        _apply(rule, key, _value(held, key))
    _check_objective(held["train"]["objective"], held["train"]["objective_options"])


def refuse(key: str, fault: rules.Fault) -> UserError:
    """The line for a value that will not do."""
    return UserError(
        f"{key}{fault.where}: {shown(fault.value)}: must be {fault.wanted}"
    )


def _apply(rule: Rule, key: str, value: Any) -> None:
    if fault := rule(value):
        raise refuse(key, fault)


def _value(held: Mapping, key: str) -> Any:
    for part in key.split("."):
        held = held[part]
    return held


def _check_keys(config, held: Mapping, wanted: Mapping, prefix: str) -> None:
    """The same groups and keys as in `config.base`, no more and no fewer."""
    for name in held:
        if name not in wanted:
            raise keys.unknown_key(keys.base(), f"{prefix}{name}", prefix[:-1])
    for name, value in wanted.items():
        key = f"{prefix}{name}"
        if name not in held:
            raise UserError(
                f"{key}: missing: begin with flowgrpo_jax.config.make(arg), which has "
                "every key"
            )
        if isinstance(value, Mapping) and key not in keys.OPEN:
            if not isinstance(held[name], Mapping):
                raise UserError(
                    f"{key}: {shown(held[name])}: is a group: set "
                    f"{key}.{next(iter(value))} and others"
                )
            _check_keys(config, held[name], value, f"{key}.")


def _check_objective(objective: str, options: Mapping[str, Any]) -> None:
    """Names, types and ranges of the objective's own options."""
    own = OBJECTIVES[objective].options
    option_fields.check_names(objective, own, options)
    for field in dataclasses.fields(own):
        if field.name in options:
            key = f"train.objective_options.{field.name}"
            _apply(_rule_of(field), key, options[field.name])
    for what in ("sigma", "node"):
        low, high = options.get(f"{what}_min", 0.0), options.get(f"{what}_max", 1.0)
        if low >= high:
            raise UserError(
                f"train.objective_options.{what}_min: {low}: must be below {what}_max "
                f"({high})"
            )


def _rule_of(field: dataclasses.Field) -> Rule:
    """What an option of an objective may hold, as its field says."""
    if words := option_fields.choices(field):
        return one_of(words)
    if (between := option_fields.between(field)) is None:
        return flag
    most = LARGEST if between.most is None else between.most
    return number(between.least, most, above=between.above, below=between.below)
