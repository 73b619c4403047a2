"""DGPO's objective: the preference of a whole group, learnt from its errors."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flowgrpo_jax.rl.likelihood import log_ratio
from flowgrpo_jax.rl.objectives.clipping import Clip, clip_advantage, measure_ratio
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.options import number
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange


@dataclass(frozen=True, kw_only=True)
class DgpoOptions(SigmaInRange):
    """`beta`: how fast the gate closes."""

    beta: float = number(100.0, above=True)


def dgpo(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: DgpoOptions,
) -> Score:
    """gate * A * error, gate = sigmoid(beta * mean_i A_i (error_i - reference_i)).

    DGPO (arXiv 2510.08425): the gradient of the group's Bradley-Terry preference. The
    gate is a constant of the group: it closes once the learner matches good samples
    better, bad ones worse than the frozen model does. A sample whose ratio
    exp(error_old - error) has left 1 - low or 1 + high on the side that its advantage
    draws it to moves no more, as PPO's does not.
    """
    error, reference = noised.error(velocity), noised.error(fixed["frozen"])
    advantage = clip_advantage(elements.advantage, clip.advantage)
    ratio = log_ratio(-error, -noised.error(fixed["old"]))
    above, below = ratio > jnp.log1p(clip.high), ratio < jnp.log1p(-clip.low)
    above, below = above & (advantage > 0), below & (advantage < 0)
    moving = jnp.where(above | below, jax.lax.stop_gradient(error), error)
    preferred = jnp.mean(advantage * (error - reference), axis=1, keepdims=True)
    gate = jax.lax.stop_gradient(jax.nn.sigmoid(options.beta * preferred))
    loss = gate * advantage * moving
    info = measure_ratio(ratio, above, below)
    return loss, info | {"policy_loss": loss, "flow_matching_loss": error}
