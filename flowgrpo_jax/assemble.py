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
from flax import traverse_util

from flowgrpo_jax import programs, prompt_checks, text_table
from flowgrpo_jax.config import is_embedded
from flowgrpo_jax.data import prompt_sets, tfds_prompts
from flowgrpo_jax.data.prompt_files import load_prompts
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout, schedule, transition
from flowgrpo_jax.flow.plan import Plan
from flowgrpo_jax.models.files import hub, lora_files
from flowgrpo_jax.models.flow_model import FlowModel, Variables, guided
from flowgrpo_jax.models.sd3 import family as sd3
from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.rewards import geneval, monitors, registry, scoring
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import paths
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.registry import WORLDS
from flowgrpo_jax.worlds.sprites import detector, world
from flowgrpo_jax.worlds.sprites import monitors as sprites_monitors

# Name -> the prompts of its "train" or "test" split.
PROMPT_SETS: dict[str, Callable[[str], list[Prompt]]] = {
    **{
        name: functools.partial(tfds_prompts.load, prompt_set)
        for name, prompt_set in prompt_sets.PROMPT_SETS.items()
    },
    **{name: one.prompts for name, one in WORLDS.items()},
}


def load_model(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> tuple[FlowModel, Variables]:
    """The networks and pretrained weights that `model` names.

    On the host; or large ones straight on the `mesh`, if one is given.
    """
    if is_embedded(config.model):
        return _load_embedded(config)
    folder = hub.folder(config.model_path or config.model)
    model = _large_model(config, folder)
    like = sd3.shapes(model, weights_dtype(config))
    if mesh is not None:
        specs = meshes.specs(like, programs.SHARDING_RULES, mesh)
        like = meshes.abstract(like, specs, mesh)
    return model, sd3.read(folder, model, like)


def abstract_model(
    config: ml_collections.ConfigDict,
) -> tuple[FlowModel, Variables]:
    """The networks and the shapes of their weights; aliases need no download."""
    if is_embedded(config.model):
        model, loaded = _load_embedded(config)
        return model, jax.eval_shape(lambda: loaded)
    planned = config.model in hub.ALIASES and not config.model_path
    place = config.model_path or config.model
    model = _large_model(config, None if planned else hub.folder(place))
    return model, sd3.shapes(model, weights_dtype(config))


def weights_dtype(config: ml_collections.ConfigDict) -> Any:
    """Of a large transformer: what learns whole is kept in fp32."""
    return jnp.dtype(config.dtype if config.train.use_lora else "float32")


def _large_model(config: ml_collections.ConfigDict, folder: Path | None) -> FlowModel:
    model = sd3.make_model(
        config.model,
        folder,
        config.resolution,
        config.max_sequence_length,
        config.train.lora_rank if config.train.use_lora else 0,
        config.train.lora_alpha,
        jnp.dtype(config.dtype),
    )
    return _with_targets(config, model)


def _with_targets(config: ml_collections.ConfigDict, model: FlowModel) -> FlowModel:
    """The model whose LoRA adapts the layers of `train.lora_targets`."""
    layers = transformer_config.adapted_layers(config.train.lora_targets)
    adapted = dataclasses.replace(model.config, lora_targets=layers)
    return dataclasses.replace(model, config=adapted)


def _load_embedded(config) -> tuple[FlowModel, Variables]:
    name = config.model
    if config.resolution:
        raise UserError(
            f"resolution: {config.resolution}: must be 0: the embedded model has one"
        )
    own = WORLDS[name].model.WEIGHTS if name in WORLDS else name
    path = paths.local(config.model_path or own)
    if not path.is_file():
        remedy = "install the package again" if name in WORLDS else "give a file"
        raise UserError(f"model: {name}: no weights at {path}: {remedy}")
    try:
        variables, size = embedded.load(path)
        model = _with_lora(config, size)
    except (TypeError, KeyError) as error:  # the header tells of something else
        raise _no_weights_of_ours(name) from error
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, variables):
        raise _no_weights_of_ours(name)
    return model, variables


def _no_weights_of_ours(name: str) -> UserError:
    return UserError(
        f"model: {name}: holds other weights than those of an embedded model: give "
        "a weights.safetensors that this package has written"
    )


def new_model(config: ml_collections.ConfigDict) -> tuple[FlowModel, Variables]:
    """The embedded model with fresh random weights, for pretraining."""
    model = _with_lora(config, WORLDS[config.model].model.Size())
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(config.seed)))


def starting_model(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> tuple[FlowModel, Variables]:
    """What a run begins with: pretraining with nothing, unless `model` is a file."""
    pretraining = config.train.objective == "flow_matching"
    if pretraining and not is_embedded(config.model):
        raise UserError(
            f"model: {config.model}: train.objective flow_matching learns from scenes "
            f"of an embedded world: must be one of {', '.join(WORLDS)}"
        )
    return new_model(config) if starts_fresh(config) else load_model(config, mesh)


def starts_fresh(config: ml_collections.ConfigDict) -> bool:
    """Whether a run begins with random weights, not with those of a file."""
    return config.train.objective == "flow_matching" and config.model in WORLDS


def warm_start(
    config: ml_collections.ConfigDict, model: FlowModel, trainable: Variables
) -> Variables:
    """What a run trains, beginning with the adapter of `train.lora_path`, if any."""
    path = config.train.lora_path
    if not path:
        return trainable
    if not config.train.use_lora or is_embedded(config.model):
        raise UserError(
            f"train.lora_path: {path}: needs train.use_lora and a diffusers model"
        )
    return {"lora": sd3.with_adapter(path, trainable["lora"], model)}


def save_result(path: Path, model: FlowModel, variables: Variables) -> None:
    """The result of a run in its workdir, as others read it.

    The embedded model's weights; of a large one the LoRA file or the transformer.
    """
    if is_embedded(model.name):
        host = jax.device_get(variables)
        embedded.save(path / "weights.safetensors", host, model)
    elif "lora" in variables:
        lora_files.write_diffusers(path, sd3.adapter(variables, model))
    else:
        sd3.write_transformer(path / "transformer", variables, model)


def make_text_table(
    config: ml_collections.ConfigDict,
    model: FlowModel,
    variables: Variables,
    texts: Sequence[str],
) -> text_table.TextTable:
    """Embeddings of these prompts and of the negative one."""
    return text_table.make(
        model, variables, texts, config.embedding_cache, config.negative_prompt
    )


def text_shape(config: ml_collections.ConfigDict, model: FlowModel) -> TextEmbedding:
    """Shapes [1, ...] of one prompt's embedding."""
    network, dtype = model.config, jnp.dtype(config.dtype)
    if model.tokenizer is not None:
        tokens, dtype = model.tokenizer.max_length, jnp.dtype(jnp.float32)
    else:
        tokens = sd3_text.CLIP_TOKENS + config.max_sequence_length
    return TextEmbedding(
        jax.ShapeDtypeStruct((1, tokens, network.joint_attention_dim), dtype),
        jax.ShapeDtypeStruct((1, network.pooled_projection_dim), dtype),
    )


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


def _with_lora(config, size: embedded.Size) -> FlowModel:
    rank = config.train.lora_rank if config.train.use_lora else 0
    model = WORLDS[size.world].model.make_model(
        size, rank, config.train.lora_alpha, jnp.dtype(config.dtype)
    )
    return _with_targets(config, model)


def load_prompt_set(name: str, split: str, key: str = "prompts") -> list[Prompt]:
    """Prompts of a named set ("train" or "test" split) or of a .txt or .jsonl file."""
    if name in PROMPT_SETS:
        return PROMPT_SETS[name](split)
    if Path(name).suffix in (".txt", ".jsonl"):
        return load_prompts(name, key)
    raise UserError(
        f"{key}: {name}: must be one of {', '.join(PROMPT_SETS)}, "
        "or a .txt or .jsonl file"
    )


def check_prompts(
    config: ml_collections.ConfigDict,
    context: registry.Context,
    prompts: Sequence[Prompt],
    key: str = "prompts",
) -> None:
    """UserError for a prompt of `key` that a reward which sees it cannot score."""
    names, source = list(config.reward), config.prompts
    if key == "eval.prompts":
        held_out = [name for name in config.monitors if registry.is_known(name)]
        names = [*(config.eval.reward or config.reward), *held_out]
        source = config.eval.prompts
    prompt_checks.check(names, context, prompts, source, key)


def reward_context(config: ml_collections.ConfigDict) -> registry.Context:
    """What the rewards of a run share: options, and the embedded world's detector."""
    options = {name: values.to_dict() for name, values in config.reward_options.items()}
    finds, own = None, options.get("geneval", {})
    if is_embedded(config.model) and not {"detector", "colors", "server"} & set(own):
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
    if training and config.train.objective != "flow_matching":
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
    if config.resolution:
        return config.resolution, config.resolution
    if config.model in WORLDS:  # pretraining begins without its weights
        model = _with_lora(config, WORLDS[config.model].model.Size())
        variables: Variables = {}
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


def make_sigmas(
    config: ml_collections.ConfigDict, model: FlowModel, num_steps: int
) -> tuple[float, ...]:
    """The sigmas of the config's schedule, as hashable floats."""
    name, own = config.sample.schedule, not config.sample.shift
    options: dict[str, Any] = {}
    if name not in ("linear", "flux"):
        options["shift"] = model.shift.value if own else config.sample.shift
    if name == "sd3" and own:
        options["dynamic"] = model.shift.dynamic
    return tuple(float(s) for s in schedule.make(name, num_steps, **options))


def make_sampler(
    config: ml_collections.ConfigDict, model: FlowModel, keep_velocity: bool = False
) -> rollout.Sampler:
    """The stochastic sampler of training."""
    sample = config.sample
    return rollout.Sampler(
        velocity=guided(model.velocity, sample.guidance_scale),
        sigmas=make_sigmas(config, model, sample.num_steps),
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
        sigmas=make_sigmas(config, model, config.sample.eval_num_steps),
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
    if train.guidance_scale:
        velocity = guided(model.velocity, train.guidance_scale)
        sampler = dataclasses.replace(sampler, velocity=velocity)
    options = train.objective_options.to_dict()
    if train.objective == "flow_matching":
        options = {"shift": config.sample.shift or model.shift.value} | options
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
    """How a policy follows the learner that samples, or that the loss compares with.

    None where both are the learner's own or its EMA.
    """
    train = config.train
    if train.behaviour == "learner":
        return None
    if train.behaviour == "frozen":
        return rl_update.Behaviour(1.0, 0.0, 0, 1.0, 1)
    if train.behaviour == "copy":
        return rl_update.Behaviour(0.0, 0.0, 0, 0.0, train.behaviour_every)
    first, rate, start, most = train.behaviour_ramp
    return rl_update.Behaviour(
        first,
        rate,
        int(start),
        most,
        train.behaviour_every,
        samples=train.behaviour == "ema",
    )
