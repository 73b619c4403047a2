"""From `reward` and `monitors` in a config to what scores images, tried once before a run."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from flowgrpo_jax.assemble.model import abstract_model, fresh_networks, starts_fresh
from flowgrpo_jax.assemble.prompts import check_prompts, load_prompt_set
from flowgrpo_jax.config import families
from flowgrpo_jax.models.flow_model import Variables
from flowgrpo_jax.rewards import geneval, monitors, registry, scoring
from flowgrpo_jax.rl.objectives.table import PRETRAINING
from flowgrpo_jax.runtime import resolution
from flowgrpo_jax.worlds.registry import WORLDS, World
from flowgrpo_jax.worlds.sprites import detector


def reward_context(config: ml_collections.ConfigDict) -> registry.Context:
    """What the rewards of a run share: options, and the embedded world's detector."""
    options = {name: values.to_dict() for name, values in config.reward_options.items()}
    finds, own = None, options.get("geneval", {})
    if families.of(config.model).embedded and not {
        "detector",
        "colors",
        "server",
    } & set(own):
        finds = detector.SpriteDetector()
        # Every sprite that the detector knows counts, in all tasks alike: its scores
        # are not those of the benchmark's detector, which counts above 0.9.
        rules = geneval.Rules(counting_threshold=0.3)
        options["geneval"] = {"rules": rules} | own
    return registry.Context(finds, options)


def try_rewards(
    config: ml_collections.ConfigDict, training: bool = True, monitored: bool = True
) -> registry.Context:
    """Call every reward of the run once, on two random images and two of its prompts.

    Before anything that takes long: RewardFailure for one that raises, does not answer
    within `reward_deadline` or returns something else than scores. The context holds
    the rewards, to be used. Without `training` those of evaluations only.
    """
    jax.devices()  # taken before a user's module may hide them (CUDA_VISIBLE_DEVICES)
    context = reward_context(config)
    combined, prompts = [], {}
    if training and config.train.objective != PRETRAINING:
        combined.append(registry.combine(config.reward.to_dict(), context))
        ours = load_prompt_set(config.prompts, "train")
        check_prompts(config, context, ours)
        prompts = dict.fromkeys(config.reward, ours)
    evaluated = config.eval.reward or config.reward
    combined.append(registry.combine(evaluated.to_dict(), context))
    held_out = []
    if monitored:
        make_monitor(config, context)  # their names and options
        held_out = monitors.held_out(config.monitors)
    ours = load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    check_prompts(config, context, ours, "eval.prompts")
    prompts = dict.fromkeys([*evaluated, *held_out], ours) | prompts
    rewards = {name: registry.make(name, context) for name in prompts}
    measured = scoring.try_out(
        rewards, prompts, _image_size(config), config.reward_deadline
    )
    for several in combined:
        several.merge({name: measured[name] for name in several.rewards})
    return context


def _image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Height and width of the images that the config's model makes."""
    if size := resolution.parse(config.resolution):
        return size
    if starts_fresh(config):  # there are no weights to ask
        model, variables = fresh_networks(config), Variables()
    else:
        model, variables = abstract_model(config)
    latents = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    _, height, width, _ = jax.eval_shape(model.decode, variables, latents).shape
    return height, width


def make_reward(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> scoring.Scorer:
    """The weighted rewards that a run learns from."""
    context = context or reward_context(config)
    combined = registry.combine(config.reward.to_dict(), context)
    return scoring.Scorer(combined, config.reward_deadline)


def make_eval_reward(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> scoring.Scorer:
    """The weighted rewards of evaluations: those of training unless others are told."""
    if not config.eval.reward:
        return make_reward(config, context)
    context = context or reward_context(config)
    combined = registry.combine(config.eval.reward.to_dict(), context)
    return scoring.Scorer(combined, config.reward_deadline)


def make_monitor(
    config: ml_collections.ConfigDict, context: registry.Context | None = None
) -> monitors.Monitor:
    """The config's monitors, and the embedded world's own where that is the model."""
    context = context or reward_context(config)
    general = monitors.make(
        config.monitors, config.reward.to_dict(), context, config.reward_deadline
    )

    own = world_of(config)

    def measure(images, prompts, owner) -> dict[str, float]:
        found = general(images, prompts, owner)
        if own is not None and own.monitors is not None:
            found |= own.monitors(images, owner)
        return found

    return _on_host(measure)


def world_of(config: ml_collections.ConfigDict) -> World | None:
    """The embedded world whose pictures the config's model paints, if any."""
    if not families.of(config.model).embedded:
        return None
    if config.model in WORLDS:
        return WORLDS[config.model]
    return WORLDS[abstract_model(config)[0].name]  # its file says so


def _on_host(function: Callable) -> Callable:
    """Rewards may use jax as they like: the loop's ban on transfers is not theirs."""

    @functools.wraps(function)
    def allowed(*args, **options):
        with jax.transfer_guard("allow"):
            return function(*args, **options)

    return allowed
