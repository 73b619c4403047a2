"""The config: every key with its default, built from a recipe and its arguments."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from flowgrpo_jax.config import families, recipes
from flowgrpo_jax.errors import UserError, not_one_of, shown
from flowgrpo_jax.models.families import DEFAULT, SCHEDULES_BEFORE

# Keys that a resumed run may change: they do not shape what was already computed.
MAY_DIFFER = frozenset(
    {
        *("num_iterations", "mesh.data", "mesh.fsdp"),
        *("checkpoint", "log", "embedding_cache"),
        # Their weights must be the same ones: base_weights.py
        *("model_path", "transformer_path"),
        *("reward_deadline", "reward_failure", "reward_batches"),
        # Where rewards are asked, and how patiently.
        *(
            f"reward_options.*.{name}"
            for name in (
                *("server", "url", "token_env", "timeout", "deadline", "retries"),
                *("batch", "concurrency", "encoding", "replay"),
            )
        ),
    }
)
# Groups whose keys are the user's: names of rewards, tasks or axes.
OPEN = frozenset(
    {
        "reward",
        "reward_options",
        "eval.reward",
        "mesh",
        "train.objective_options",
        "train.caption_noise",
    }
)
# What other programs call a key -> the key, for the line about an unknown one.
ALIASES: Mapping[str, tuple[str, ...]] = {
    other: keys
    for names, keys in (
        ("lr rate", ("train.learning_rate",)),
        ("kl kl_coef kl_coeff kl_weight kl_beta", ("train.beta",)),
        ("rank lora_r r", ("train.lora_rank",)),
        ("alpha", ("train.lora_alpha",)),
        ("lora", ("train.use_lora",)),
        ("target_modules lora_target_modules", ("train.lora_targets",)),
        ("clip clip_eps cliprange epsilon", ("train.clip_range",)),
        ("adv_clip advantage_clip", ("train.adv_clip_max",)),
        (
            "grad_clip max_norm gradient_clip max_gradient_norm",
            ("train.max_grad_norm",),
        ),
        ("warmup warmup_steps", ("train.warmup_iterations",)),
        ("eta noise", ("sample.noise_level",)),
        ("cfg cfg_scale guidance", ("sample.guidance_scale", "eval.guidance_scale")),
        ("steps", ("sample.num_steps", "num_iterations")),
        ("num_inference_steps inference_steps", ("sample.num_steps",)),
        ("epochs num_epochs iterations max_steps train_steps", ("num_iterations",)),
        ("num_generations num_images group num_image_per_prompt", ("group_size",)),
        ("batch_size micro_batch_size gradient_accumulation_steps", ("microbatch",)),
        ("num_prompts prompts_per_step", ("prompts_per_iteration",)),
        ("inner_epochs num_updates", ("updates_per_iteration",)),
        ("dataset prompts_file train_prompts", ("prompts",)),
        ("test_prompts eval_dataset", ("eval.prompts",)),
        ("rewards reward_fn reward_func", ("reward",)),
        ("precision mixed_precision bf16 fp16", ("dtype",)),
        ("gradient_checkpointing checkpointing", ("remat",)),
        ("size height width", ("resolution",)),
        ("save_every save_freq save_steps", ("checkpoint.every",)),
        ("eval_every eval_freq eval_steps", ("eval.every",)),
        ("log_every logging_steps", ("log.every",)),
        ("project wandb_project", ("log.wandb",)),
        ("base_model model_name pretrained", ("model",)),
        ("transformer unet ckpt checkpoint_path single_file", ("transformer_path",)),
    )
    for other in names.split()
}


def _group(*values: Any) -> ml_collections.ConfigDict:
    """A ConfigDict whose keys may have dots: a user's reward is a dotted path."""
    return ml_collections.ConfigDict(*values, allow_dotted_keys=True)


def base() -> ml_collections.ConfigDict:
    """Every key of every config, with its default and its meaning."""
    c = _group
    return c(
        {
            "seed": 42,
            # An embedded model (sprites | words), a .safetensors file of its weights, a
            # diffusers folder, a hub id, or a short name of one: see models/families.py.
            "model": "sprites",
            "model_path": "",  # where its files lie, if not where `model` says (--model)
            # Its transformer from here: a .safetensors file (ComfyUI's, its makers' or
            # diffusers') or a diffusers transformer folder; "" = the model's own
            "transformer_path": "",
            # 512 pixels along both sides, or HEIGHTxWIDTH; 0 = the model's own
            "resolution": ml_collections.FieldReference(0, field_type=object),
            "max_sequence_length": 256,  # T5 tokens of a prompt
            "negative_prompt": "",  # what guidance leads away from
            "embedding_cache": "~/.cache/flowgrpo_jax/embeddings",
            "recipe": "flow_grpo",  # row of config/recipes.py; choose with file.py:recipe=...
            "prompts": "sprites",  # prompt set, .txt or .jsonl for training
            # Name, or package.module.function -> weight; 0 = measured only
            "reward": c({"geneval": 1.0}),
            "reward_options": c(),  # name -> keyword arguments
            # Never optimised, measured at evaluations: diversity, saturation,
            # high_frequency, clip_diversity, objects, or a reward's name
            "monitors": ("diversity", "saturation", "high_frequency"),
            "reward_deadline": 600.0,  # seconds to wait for rewards, once sampled
            "reward_failure": "stop",  # or skip: groups without rewards teach nothing
            "reward_batches": 1,  # of a rollout: one is scored while the next is sampled
            "num_iterations": 400,
            "prompts_per_iteration": 48,
            "group_size": 24,  # images per prompt
            "updates_per_iteration": 2,  # optimizer steps per rollout
            "microbatch": 8,  # images that go through the network at once
            "dtype": "float32",  # of matmuls and residuals; or bfloat16
            # What a block keeps for its gradients: none (all of it) | dense | attention |
            # full (its input alone; a pass more of work, little memory)
            "remat": "none",
            "mesh": c(
                {
                    "data": -1,  # devices that share microbatches; -1: all the rest
                    "fsdp": 1,  # that share the weights too
                    # Whether gradients are the same bits on any mesh: slower, and what
                    # learns is whole on every device (docs/hosts.md).
                    "exact": False,
                }
            ),
            "sample": c(
                {
                    # Which steps are stochastic: all | subset | window |
                    # random_window | progressive_window | branch | tree | ode
                    "plan": "all",
                    "num_steps": 10,
                    "eval_num_steps": 40,
                    # model (its own scheduler's) | linear | shifted | by_tokens
                    "schedule": "model",
                    "shift": 3.0,  # 0 = that of the model's scheduler
                    "guidance_scale": 4.5,  # 1 = no guidance
                    "noise_level": 0.7,
                    "noise_levels": (),  # one per step, in place of noise_level
                    "sde_type": "sde",  # sde | cps | cps_gaussian | dance
                    "init_noise": "independent",  # shared | correlated within a group
                    "noise_correlation": 0.3,  # share of a member's own first noise
                    "sde_window_size": 2,
                    "sde_window_range": (0, 5),  # steps that a window may hold
                    "window_every": 25,  # progressive: iterations at one place
                    "window_decay": 0.0,  # progressive: shorter at later places
                    "finish_ratio": 0.0,  # after a window: share of steps, 2nd order
                    "branch_steps": (),  # where members part; () = a random window
                    "branch_anchors": 1,  # first noises of a prompt that branch
                    "merge_steps": (),  # sigmas that each branch step jumps over
                    "granularities": (1,),  # after a branch: every g-th step
                    "whole_anchor": False,  # the anchor's own image too, unrewarded
                    "fanout": 2,  # tree: children where it parts
                    "probe_steps": 0,  # ODE steps that rate every state; 0 = none
                }
            ),
            "train": c(
                {
                    # ppo_clip | guard | dppo | policy_gradient; on samples: nft | awm |
                    # dgpo | crd | dpo | weighted_matching | flow_matching
                    "objective": "ppo_clip",
                    "objective_options": c(),  # keyword arguments of the objective
                    # Of the loss, where it learns from samples; 0 = that of sampling
                    "guidance_scale": 0.0,
                    "optimizer": "adamw",  # or muon
                    "learning_rate": 3e-4,
                    "warmup_iterations": 0,
                    "decay_iterations": 0,  # linear decay to 0 over the last ones
                    "weight_decay": 1e-4,
                    "adam_eps": 1e-8,
                    "max_grad_norm": 1.0,  # 0 = gradients are not clipped
                    "update_order": "chunks",  # or steps: one update per trained step
                    "clip_range": 1e-4,
                    "clip_range_high": 0.0,  # 0 = clip_range
                    "adv_clip_max": 5.0,
                    "advantage_std": "global",  # global | group | none
                    "advantage_key": "prompt",  # what is compared: prompt|step|anchor
                    "advantage_centre": "mean",  # mean | leave_one_out | none
                    "advantage_ddof": 0,
                    "advantage_eps": 1e-4,
                    # What has none: it leaves the mean of an update, or counts in it
                    "zero_advantage": "drop",  # drop | count
                    "backup": "sum",  # of leaves to actions: sum | mean | difference
                    # Of several rewards: sum, zscore (of each over the batch, then
                    # sum), advantage (of each, then sum), advantage_mean (that, over
                    # the sum of weights), gdpo (that, over its std)
                    "reward_combination": "sum",
                    "step_weight": "none",  # or std (TempFlow)
                    "draws": 1,  # on samples: sigmas per image
                    "select": "all",  # on samples: all | best
                    # Who samples: learner | ema | copy | frozen, or learner_beside_ema:
                    # the learner, and ema_beta's average goes by behaviour_ramp
                    "behaviour": "learner",
                    "behaviour_ramp": (0.0, 0.001, 0, 0.5),  # first, rate, start, most
                    "behaviour_every": 1,  # updates
                    "beta": 0.04,  # weight of the KL to the reference
                    "kl_form": "official",  # official | paper | velocity
                    "kl_reference": "frozen",  # frozen | ema | guided
                    "kl_guidance_scale": 4.5,  # of the guided reference
                    "kl_floor": 1.0,  # share of beta that a sample of no reward keeps
                    "ema_beta": 0.0,  # weight of a velocity KL to an EMA
                    "norm_hinge": 0.0,  # weight of |v| above the reference's
                    "timestep_fraction": 0.99,  # plans all, subset, tree: trained part
                    "parameters": "",  # regex: which of the transformer's; "" = all
                    "use_lora": True,
                    "lora_rank": 32,
                    "lora_alpha": 64.0,
                    # Regexes of the ends of diffusers' module names
                    "lora_targets": (r"attn\.(to|add)_.*",),
                    "lora_path": "",  # begin with this LoRA file or PEFT folder
                    "ema": True,  # evaluate and export the EMA
                    "ema_decay": 0.9,
                    "ema_every": 8,  # optimizer steps; until the first of these, every one
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
                    "reward": c(),  # as `reward`; empty = the same
                    "images_per_task": 48,  # during training
                    "final_images_per_task": 100,  # at the start and the end, and
                    # there every held-out prompt at least once
                    "guidance_scale": 4.5,
                    # Warn when the reward is up and a monitor is worse by more than
                    # this share (of its first value; of its std if it is a reward)
                    "monitor_threshold": 0.2,
                    "sde": True,  # the reward of training's sampler too, and its gap
                    "seed": 0,
                }
            ),
            # Every so many iterations, and once so many minutes have passed (0 = never):
            # when to save changes no number. The last `keep` stay.
            "checkpoint": c({"every": 50, "minutes": 15.0, "keep": 2}),
            "log": c({"every": 1, "wandb": "", "tensorboard": True}),
        }
    )


def make(
    arg: str | None = None,
    recipe: str = "flow_grpo",
    task: Mapping[str, Any] | None = None,
    by_recipe: Mapping[str, Mapping[str, Any]] | None = None,
    **values: Any,
) -> ml_collections.ConfigDict:
    """Defaults, `task`, the recipe's row, `values` (dotted with `__`), then `arg`.

    `task` is what suits a task whatever the recipe, where the recipe leaves it open;
    `by_recipe` changes one recipe and `values` any. `arg` is what follows the colon of --config=file.py:...,
    as `key=value,key=value` with top-level keys (model, recipe, ...). A model also takes
    the defaults of its family, and what the recipe's authors trained that family with.
    """
    chosen = parse_argument(arg)
    config = base()
    config.recipe = chosen.pop("recipe", recipe)
    row = recipes.recipe(config.recipe)
    family = families.of(chosen.get("model", values.get("model", config.model)))
    layers: list[Mapping[str, Any]] = [
        family.defaults,
        task or {},
        row.values,
        row.authors.get(family.trained_as, {}),
        (by_recipe or {}).get(config.recipe, {}),
        {key.replace("__", "."): value for key, value in values.items()},
        chosen,
    ]
    for layer in layers:
        for key, value in layer.items():
            assign(config, key, value)
    return config


def for_model(
    arg: str | None, large: Mapping[str, Any], **worlds: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """`make` with the arguments that the task has for the model that `arg` chooses.

    `worlds` are those of embedded models, the first of which is the default and what a
    file of weights is taken for; `large` those of any other. UserError if the task has
    none.
    """
    own = families.embedded_worlds()
    default = next(iter(worlds), DEFAULT)
    model = parse_argument(arg).get("model", default)
    given = large
    if families.of(model).embedded:
        name = model if model in own else default
        if name not in worlds:
            fitting = "".join(f"{world}, " for world in worlds)
            raise UserError(
                f"model: {model}: this task is not of the embedded world it paints: take "
                f"{fitting}{DEFAULT}, a diffusers folder or a hub id"
            )
        given = worlds[name]
    return make(arg, **{"model": model} | dict(given))


def parse_argument(arg: str | None) -> dict[str, str]:
    """`model=x,recipe=y` to a dict; UserError for anything else."""
    pairs = {}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f"config argument: {part}: must look like recipe=flow_grpo")
        pairs[key] = value
    return pairs


def assign(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Set a dotted key; UserError for one that there is not, or of another type."""
    current = get(config, key)
    path, _, last = key.rpartition(".")
    node = get(config, path) if path else config
    if isinstance(value, Mapping):
        node[last] = _group(dict(value))
        return
    group = isinstance(current, ml_collections.ConfigDict)
    if key == "resolution" and isinstance(value, str):  # or a number
        node[last] = int(value) if value.isdecimal() else value
        return
    if isinstance(value, str) and not isinstance(current, str):
        inner = group and next(iter(current), "NAME")
        flag = f"--config.{key}.{inner}" if inner else f"--config.{key}"
        raise UserError(f"{key}: {shown(value)}: set it with {flag}=... instead")
    if group:
        raise UserError(f"{key}: {shown(value)}: is a group: give names and values")
    try:
        node[last] = value
    except (TypeError, OverflowError) as error:
        raise UserError(
            f"{key}: {shown(value)}: must be like {shown(current)}"
        ) from error


def get(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a dotted key; UserError with the nearest key if there is none."""
    node = config
    path = key.split(".")
    for depth, part in enumerate(path):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            raise unknown_key(config, key, ".".join(path[:depth]))
        node = node[part]
    return node


def unknown_key(config: ml_collections.ConfigDict, key: str, group: str) -> UserError:
    """The line for a key that `group` has not: the nearest ones, or all that it has."""
    name = key.rpartition(".")[2]
    if group in ("reward", "eval.reward"):
        from flowgrpo_jax.rewards import (
            registry,  # jax comes with it, and takes seconds
        )

        if name not in registry.REWARDS:
            return not_one_of(group, name, registry.REWARDS)
        return UserError(
            f"{key}: not a reward of this config: give all of its rewards, as in "
            f"--config.{group}=\"{{'{name}': 1.0}}\""
        )
    if near := _nearest(config, key):
        return UserError(
            f"{shown(key)}: unknown config key: did you mean {' or '.join(near)}?"
        )
    node = get(config, group) if group else config
    inside = list(node) if isinstance(node, ml_collections.ConfigDict) else []
    where = f"in {group} " if group else ""
    return UserError(
        f"{shown(key)}: unknown config key: the keys {where}are "
        f"{', '.join(map(str, inside)) or 'none'}"
    )


def _nearest(config: ml_collections.ConfigDict, key: str) -> list[str]:
    """Keys that may have been meant: of the same last part, by other names, alike."""
    keys = list(_all_keys(config))
    name = key.rpartition(".")[2]
    near = [one for one in keys if one.rpartition(".")[2] == name]
    near += ALIASES.get(name.lower(), ())
    near += difflib.get_close_matches(key[:100], keys, 1, 0.8 if near else 0.6)
    return list(dict.fromkeys(near))[:3]


def _all_keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all groups and leaves."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ml_collections.ConfigDict):
            yield from _all_keys(value, f"{prefix}{key}.")


def from_json(held: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config that a workdir holds; keys that are newer than it get their default."""
    config = base()
    _take(config, held, "")
    schedule = config.sample.schedule
    config.sample.schedule = SCHEDULES_BEFORE.get(schedule, schedule)
    return config


def _take(config: ml_collections.ConfigDict, held: Mapping, prefix: str) -> None:
    for name, value in held.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in OPEN:
            if not value:
                get(config, key)  # is there such a group?
            _take(config, value, f"{key}.")
        else:
            assign(config, key, tuple(value) if isinstance(value, list) else value)
