"""From `train` in a config to the loss, and to the fixed policies that it reads."""

import dataclasses

import ml_collections

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.rl.objectives.table import PRETRAINING


def make_loss(
    config: ml_collections.ConfigDict, model: FlowModel, sampler: rollout.Sampler
) -> losses.Loss:
    """The objective and its regularizers, as the config composes them."""
    train = config.train
    if train.kl_reference == "guided":
        scale = train.kl_guidance_scale
        guide = dataclasses.replace(sampler, velocity=model.guided(scale))
    else:
        guide = None
    if train.guidance_scale:
        velocity = model.guided(train.guidance_scale)
        sampler = dataclasses.replace(sampler, velocity=velocity)
    options = train.objective_options.to_dict()
    if train.objective == PRETRAINING:
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
        draws=train.draws,
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
