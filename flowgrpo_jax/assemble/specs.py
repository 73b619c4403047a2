"""From a config to typed specs: each value is read here, and below nobody asks for it."""

import functools

import jax.numpy as jnp
import ml_collections

from flowgrpo_jax.assemble.model import trainable_part
from flowgrpo_jax.assemble.objective import fixed_policies, make_behaviour, make_loss
from flowgrpo_jax.assemble.sampler import make_eval_sampler, make_sampler
from flowgrpo_jax.engine.credit import UpdateSpec
from flowgrpo_jax.engine.planner import PlanSpec
from flowgrpo_jax.engine.policy import PolicySpec
from flowgrpo_jax.engine.workload import LearnerSpec
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.inference.evaluator import EvalSpec
from flowgrpo_jax.inference.pipeline import ImageSpec, Sized
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rl.advantage import AdvantageSpec
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from flowgrpo_jax.rl.update import Ema, OptimizerSpec
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import metric_names


def mesh_shape(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Devices along each axis of the mesh; -1 for all the rest."""
    return {axis: config.mesh[axis] for axis in meshes.AXES if axis in config.mesh}


def exact(config: ml_collections.ConfigDict) -> bool:
    """Whether gradients are to be the same bits on any mesh."""
    return config.mesh.get("exact", False)


def plan_spec(config: ml_collections.ConfigDict) -> PlanSpec:
    """Which transitions are stochastic, and how prompts are packed."""
    sample = config.sample
    return PlanSpec(
        kind=sample.plan,
        seed=config.seed,
        prompts_per_iteration=config.prompts_per_iteration,
        group_size=config.group_size,
        updates_per_iteration=config.updates_per_iteration,
        microbatch=config.microbatch,
        reward_batches=config.reward_batches,
        exact=exact(config),
        num_steps=sample.num_steps,
        timestep_fraction=config.train.timestep_fraction,
        shared_noise=sample.init_noise == "shared",
        window_size=sample.sde_window_size,
        window_range=tuple(sample.sde_window_range),
        window_every=sample.window_every,
        window_decay=sample.window_decay,
        finish_ratio=sample.finish_ratio,
        branch_steps=tuple(sample.branch_steps),
        branch_anchors=sample.branch_anchors,
        merge_steps=tuple(sample.merge_steps),
        granularities=tuple(sample.granularities),
        whole_anchor=sample.whole_anchor,
        fanout=sample.fanout,
        probe_steps=sample.probe_steps,
    )


def policy_spec(config: ml_collections.ConfigDict) -> PolicySpec:
    """How a run goes through its prompts."""
    return PolicySpec(
        seed=config.seed,
        prompts_per_iteration=config.prompts_per_iteration,
        num_iterations=config.num_iterations,
        skip_failures=config.reward_failure == "skip",
    )


def advantage_spec(config: ml_collections.ConfigDict) -> AdvantageSpec:
    """What is compared with what."""
    train = config.train
    return AdvantageSpec(
        weights=config.reward.to_dict(),
        key=train.advantage_key,
        std=train.advantage_std,
        ddof=train.advantage_ddof,
        eps=train.advantage_eps,
        clip=train.adv_clip_max,
        backup=train.backup,
        combine=train.reward_combination,
        centre=train.advantage_centre,
    )


def update_spec(config: ml_collections.ConfigDict) -> UpdateSpec:
    """How what was sampled is dealt to the optimizer steps."""
    train = config.train
    return UpdateSpec(
        updates_per_iteration=config.updates_per_iteration,
        microbatch=config.microbatch,
        in_steps=train.update_order == "steps",
        draws=train.draws,
        best_only=train.select == "best",
        count_zeros=train.zero_advantage == "count",
        exact=exact(config),
    )


def optimizer_spec(config: ml_collections.ConfigDict) -> OptimizerSpec:
    """The optimizer; what the config counts in iterations, in updates."""
    train, updates = config.train, config.updates_per_iteration
    return OptimizerSpec(
        name=train.optimizer,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        eps=train.adam_eps,
        max_grad_norm=train.max_grad_norm,
        warmup=train.warmup_iterations * updates,
        decay=train.decay_iterations * updates,
        total=config.num_iterations * updates,
    )


def learner_spec(
    config: ml_collections.ConfigDict, model: FlowModel, sampler: rollout.Sampler
) -> LearnerSpec:
    """What learns, from what; `sampler` is training's."""
    train = config.train
    row = OBJECTIVES[train.objective]
    return LearnerSpec(
        loss=make_loss(config, model, sampler),
        needs=fixed_policies(config),
        consumes=row.consumes,
        grouping=row.grouping,
        trainable_part=functools.partial(trainable_part, config, model),
        partly=train.use_lora or bool(train.parameters),
        optimizer=optimizer_spec(config),
        ema=Ema(train.ema_decay, train.ema_every),
        behaviour=make_behaviour(config),
        guidance_scale=train.guidance_scale or config.sample.guidance_scale,
        microbatch=config.microbatch,
        dtype=jnp.dtype(config.dtype),
        exact=exact(config),
    )


def image_spec(config: ml_collections.ConfigDict) -> ImageSpec:
    """How images are made from weights that are there."""
    return ImageSpec(
        name=config.model,
        seed=config.eval.seed,
        microbatch=config.microbatch,
        dtype=jnp.dtype(config.dtype),
    )


def eval_spec(config: ml_collections.ConfigDict, *models: FlowModel) -> EvalSpec:
    """The columns of an evaluation: as the model is used, and without guidance.

    `models`: the config's model, and the same at other sizes.
    """
    scale, trained = config.eval.guidance_scale, config.sample.guidance_scale
    scales = {metric_names.GUIDED: scale}
    if scale != 1.0 and models[0].denoiser.guidance != "none":
        scales[metric_names.UNGUIDED] = 1.0
    # The deterministic column that training's sampler is compared with guides alike.
    alike = [name for name, one in scales.items() if one == trained]
    stochastic = config.eval.sde and config.sample.plan != "ode"

    def samplers(model: FlowModel) -> dict[str, rollout.Sampler]:
        made = {
            name: make_eval_sampler(config, model, one) for name, one in scales.items()
        }
        if stochastic:
            made[metric_names.STOCHASTIC] = make_sampler(config, model)
        return made

    return EvalSpec(
        images=image_spec(config),
        sized=[Sized(model, samplers(model)) for model in models],
        columns=tuple(scales),
        images_per_task=config.eval.images_per_task,
        final_images_per_task=config.eval.final_images_per_task,
        stochastic=stochastic,
        deterministic=(alike or list(scales))[0],
    )
