"""From names in the config to the things they stand for: model, prompts, rewards."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from flowgrpo_jax.data import tfds_prompts
from flowgrpo_jax.data.prompts import Prompt, load_prompts
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout, schedule, transition
from flowgrpo_jax.flow.plan import Plan
from flowgrpo_jax.models.flow_model import FlowModel, Variables, guided
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.rewards import geneval, monitors, registry
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.sprites import detector, world
from flowgrpo_jax.sprites import model as sprites_model
from flowgrpo_jax.sprites import monitors as sprites_monitors
from flowgrpo_jax.sprites import prompts as sprites_prompts

PROMPT_SETS = {
    **tfds_prompts.PROMPT_SETS,
    sprites_prompts.PROMPTS.name: sprites_prompts.PROMPTS,
}


def load_model(
    config: ml_collections.ConfigDict,
) -> tuple[FlowModel, Variables]:
    """The networks and pretrained weights (on the host) that `model` names."""
    name = config.model
    if name != "sprites" and not name.endswith(".safetensors"):
        raise UserError(
            f"model: {name}: must be sprites (the embedded model) or a "
            ".safetensors file of its weights"
        )
    path = sprites_model.WEIGHTS if name == "sprites" else Path(name)
    if not path.is_file():
        remedy = "install the package again" if name == "sprites" else "give a file"
        raise UserError(f"model: {name}: no weights at {path}: {remedy}")
    try:
        variables, size = sprites_model.load(path)
    except TypeError as error:  # the header tells of other fields
        raise _no_weights_of_ours(config.model) from error
    model = _with_lora(config, size)
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, variables):
        raise _no_weights_of_ours(config.model)
    return model, variables


def _no_weights_of_ours(name: str) -> UserError:
    return UserError(
        f"model: {name}: holds other weights than those of the embedded model: give "
        "a weights.safetensors that this package has written"
    )


def new_model(config: ml_collections.ConfigDict) -> tuple[FlowModel, Variables]:
    """The embedded model with fresh random weights, for pretraining."""
    model = _with_lora(config, sprites_model.Size())
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(config.seed)))


def starting_model(config: ml_collections.ConfigDict) -> tuple[FlowModel, Variables]:
    """What a run begins with: pretraining with nothing, unless `model` is a file."""
    pretraining = config.train.objective == "flow_matching"
    fresh = pretraining and config.model == "sprites"
    return new_model(config) if fresh else load_model(config)


def trainable_part(
    config: ml_collections.ConfigDict, model: FlowModel, loaded: Variables
) -> Variables:
    """The variables that a run trains: an adapter, the transformer or everything.

    Of the transformer only what `train.parameters` matches; UserError if nothing does.
    """
    if config.train.use_lora:
        init = jax.jit(functools.partial(model.init, lora=True))
        return init(jax.random.key(config.seed))
    if config.train.trains_text:
        return loaded
    wanted = re.compile(config.train.parameters)
    leaves = traverse_util.flatten_dict(loaded["transformer"], sep="/")
    chosen = {path: leaf for path, leaf in leaves.items() if wanted.search(path)}
    if not chosen:
        raise UserError(
            f"train.parameters: {config.train.parameters}: matches no parameter of the "
            f"transformer: their names are like {', '.join(list(leaves)[:3])}"
        )
    return {"transformer": traverse_util.unflatten_dict(chosen, sep="/")}


def _with_lora(config, size: sprites_model.Size) -> FlowModel:
    rank = config.train.lora_rank if config.train.use_lora else 0
    return sprites_model.make_model(
        size, rank, config.train.lora_alpha, jnp.dtype(config.dtype)
    )


def load_prompt_set(name: str, split: str, key: str = "prompts") -> list[Prompt]:
    """Prompts of a named set ("train" or "test" split) or of a .txt or .jsonl file."""
    if name in PROMPT_SETS:
        return tfds_prompts.load(PROMPT_SETS[name], split)
    if Path(name).suffix in (".txt", ".jsonl"):
        return load_prompts(name)
    raise UserError(
        f"{key}: {name}: must be one of {', '.join(PROMPT_SETS)}, "
        "or a .txt or .jsonl file"
    )


def reward_context(config: ml_collections.ConfigDict) -> registry.Context:
    """What the rewards of a run share: options, and the embedded world's detector."""
    options = {name: values.to_dict() for name, values in config.reward_options.items()}
    finds, own = None, options.get("geneval", {})
    embedded = config.model == "sprites" or Path(config.model).suffix == ".safetensors"
    if embedded and not {"detector", "colors"} & set(own):
        finds = detector.SpriteDetector()
        # Every sprite that the detector knows counts, in all tasks alike: its scores
        # are not those of the benchmark's detector, which counts above 0.9.
        rules = geneval.Rules(counting_threshold=0.3)
        options["geneval"] = {"rules": rules} | own
    return registry.Context(finds, options)


def make_reward(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> registry.Reward:
    """The weighted rewards that a run learns from."""
    context = context or reward_context(config)
    return _on_host(registry.combine(config.reward.to_dict(), context))


def make_eval_reward(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> registry.Reward:
    """The weighted rewards of evaluations: those of training unless others are told."""
    if not config.eval.reward:
        return make_reward(config, context)
    context = context or reward_context(config)
    return _on_host(registry.combine(config.eval.reward.to_dict(), context))


def make_monitor(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> monitors.Monitor:
    """The config's monitors, and the embedded world's own where that is the model."""
    context = context or reward_context(config)
    general = monitors.make(config.monitors, config.reward.to_dict(), context)

    def measure(images, prompts, owner) -> dict[str, float]:
        found = general(images, prompts, owner)
        if images.shape[1] == world.SIZE:
            found |= sprites_monitors.measure(images, owner)
        return found

    return _on_host(measure)


def _on_host(function: Callable) -> Callable:
    """Rewards may use jax as they like: the loop's ban on transfers is not theirs."""

    @functools.wraps(function)
    def allowed(*args, **options):
        with jax.transfer_guard("allow"):
            return function(*args, **options)

    return allowed


def make_sigmas(config: ml_collections.ConfigDict, num_steps: int) -> tuple[float, ...]:
    """The sigmas of the config's schedule, as hashable floats."""
    name = config.sample.schedule
    options = {} if name in ("linear", "flux") else {"shift": config.sample.shift}
    return tuple(float(s) for s in schedule.make(name, num_steps, **options))


def make_sampler(
    config: ml_collections.ConfigDict, model: FlowModel, keep_velocity: bool = False
) -> rollout.Sampler:
    """The stochastic sampler of training."""
    sample = config.sample
    return rollout.Sampler(
        velocity=guided(model.velocity, sample.guidance_scale),
        sigmas=make_sigmas(config, sample.num_steps),
        kind=sample.sde_type,
        noise_level=tuple(sample.noise_levels) or sample.noise_level,
        correlation=(
            sample.noise_correlation if sample.init_noise == "correlated" else None
        ),
        keep_velocity=keep_velocity,
    )


def make_eval_sampler(
    config: ml_collections.ConfigDict, model: FlowModel, guidance_scale: float
) -> rollout.Sampler:
    """The deterministic sampler of evaluation: the ODE, more steps."""
    return rollout.Sampler(
        velocity=guided(model.velocity, guidance_scale),
        sigmas=make_sigmas(config, config.sample.eval_num_steps),
        kind="ode",
        noise_level=0.0,
    )


def check_actions(sampler: rollout.Sampler, plans: Sequence[Plan]) -> None:
    """UserError if a trained step adds no noise: it has no likelihood to learn from."""
    for made in plans:
        ends = {(made.nodes[n].at, made.nodes[acts[0]].at) for n, acts in made.states}
        for step, stop in sorted(ends):
            sigma, sigma_next, options = rollout.step_arguments(
                sampler, step, stop, 1.0
            )
            blank = jnp.zeros(1)
            drawn = transition.gaussian(
                sampler.kind, blank, blank, sigma, sigma_next, **options
            )
            if not drawn.std > 0:
                raise UserError(
                    f"sample.noise_level: the {sampler.kind} step {step} of "
                    f"{sampler.num_steps} is trained and has no noise: leave it out "
                    "(train.timestep_fraction, the window) or raise the level"
                )


def make_loss(
    config: ml_collections.ConfigDict, model: FlowModel, sampler: rollout.Sampler
) -> losses.Loss:
    """The objective and its regularizers, as the config composes them."""
    train = config.train
    if train.kl_reference == "guided":
        scale = train.kl_guidance_scale
        guide = dataclasses.replace(sampler, velocity=guided(model.velocity, scale))
    else:
        guide = None
    options = train.objective_options.to_dict()
    if train.objective == "flow_matching":
        options = {"shift": config.sample.shift} | options
    return losses.make(
        sampler,
        train.objective,
        options,
        clip_range=train.clip_range,
        clip_range_high=train.clip_range_high or None,
        adv_clip_max=train.adv_clip_max,
        beta=train.beta,
        kl_form=train.kl_form,
        kl_reference=train.kl_reference,
        reference_sampler=guide,
        kl_floor=train.kl_floor,
        step_weight=train.step_weight,
        trained_steps=tuple(config.sample.branch_steps) or None,
        ema_beta=train.ema_beta,
        norm_hinge=train.norm_hinge,
    )


def fixed_policies(config: ml_collections.ConfigDict) -> frozenset[str]:
    """Which of "old_velocity", "old", "frozen", "ema" the loss reads."""
    train = config.train
    return losses.needs(
        train.objective,
        beta=train.beta,
        kl_reference=train.kl_reference,
        ema_beta=train.ema_beta,
        norm_hinge=train.norm_hinge,
    )


def make_behaviour(config: ml_collections.ConfigDict) -> rl_update.Behaviour | None:
    """How the policy that samples follows the learner; None where it is the learner."""
    train = config.train
    if train.behaviour == "learner":
        return None
    if train.behaviour == "frozen":
        return rl_update.Behaviour(1.0, 0.0, 0, 1.0, 1)
    if train.behaviour == "copy":
        return rl_update.Behaviour(0.0, 0.0, 0, 0.0, train.behaviour_every)
    first, rate, start, most = train.behaviour_ramp
    return rl_update.Behaviour(first, rate, int(start), most, train.behaviour_every)


@functools.cache
def _text_encoder(model: FlowModel) -> Callable:
    return jax.jit(model.encode_text)


class TextTable:
    """Embeddings of all prompts of a run, made once; rows are picked per iteration."""

    def __init__(
        self, model: FlowModel, variables: Variables, texts: list[str], batch: int = 64
    ):
        self._row = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
        encode = _text_encoder(model)
        weights = jax.device_put({"text": variables["text"]})
        ids = model.tokenizer(list(self._row))
        padded = np.concatenate([ids, np.repeat(ids[:1], -len(ids) % batch, axis=0)])
        parts = [
            jax.device_get(encode(weights, jax.device_put(padded[i : i + batch])))
            for i in range(0, len(padded), batch)
        ]
        self._table: Any = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def rows(self, texts: list[str]) -> TextEmbedding:
        """Embeddings of these prompts, in order, on the host."""
        index = np.array([self._row[text] for text in texts])
        return jax.tree.map(lambda rows: rows[index], self._table)

    @property
    def empty(self) -> TextEmbedding:
        """The one row of the empty (negative) prompt."""
        return self.rows([""])
