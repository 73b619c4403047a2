"""Flow-DPPO's objective: a trust region on the KL of a step, not on its ratio."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgrpo_jax.rl.divergence import kl_on_means
from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip, clip_advantage, measure_ratio
from flowgrpo_jax.rl.objectives.noised import Score
from flowgrpo_jax.rl.objectives.options import number


@dataclass(frozen=True, kw_only=True)
class DppoOptions:
    """The KL at which a policy is far: 1e-5 in UniRL and verl-omni."""

    threshold: float = number(1e-5, above=True)


def dppo(
    actions: Actions,
    advantage: Float[Array, "slot sibling"],
    clip: Clip,
    options: DppoOptions,
) -> Score:
    """-A * rho, no longer followed outwards from a policy that is already far.

    Flow-DPPO (arXiv 2606.11025): where D = |mean - mean_old|^2 / (2 std^2), the KL of
    the step from its old Gaussian, has reached `threshold`, elements that would push
    the ratio further from 1 (above it with A > 0, below it with A < 0) are left out.
    The flags tell which they were.
    """
    assert actions.old_gaussian is not None
    divergence = jax.vmap(functools.partial(kl_on_means, "paper"))(
        actions.gaussian.mean, actions.old_gaussian.mean, actions.gaussian
    )[:, None]
    log_ratio = actions.log_ratio
    advantage = clip_advantage(advantage, clip.advantage)
    far = divergence >= options.threshold
    above = far & (log_ratio > 0) & (advantage > 0)
    below = far & (log_ratio < 0) & (advantage < 0)
    loss = jnp.where(above | below, 0.0, -advantage * jnp.exp(log_ratio))
    return loss, measure_ratio(log_ratio, above, below)
