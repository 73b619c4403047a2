"""GRPO-Guard's objective: clipped ratios whose bias is taken off."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.flow.transition import Gaussian
from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip, clipped_surrogate
from flowgrpo_jax.rl.objectives.noised import Score


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """With `divide_by_dt` all steps pull equally hard."""

    divide_by_dt: bool = True


def guard(
    actions: Actions,
    advantage: Float[Array, "slot sibling"],
    clip: Clip,
    options: GuardOptions,
) -> Score:
    """max(-A * rho, -A * clip(rho, 1 - low, 1 + high)) / |dt|, GRPO-Guard's rho.

    log rho = std * (log(pi / pi_old) + |mean - mean_old|^2 / (2 std^2)), see
    `guard_log_ratio` (arXiv 2510.22319: ratio normalisation and gradient
    reweighting). Its clip ranges are about 2e-6.
    """
    assert actions.old_gaussian is not None
    per_action = jax.vmap(guard_log_ratio, (0, None, None))
    log_ratio = jax.vmap(per_action)(
        actions.next_latent, actions.gaussian, actions.old_gaussian
    )
    loss, info = clipped_surrogate(log_ratio, advantage, clip)
    return loss / actions.dt[:, None] if options.divide_by_dt else loss, info


def guard_log_ratio(
    next_latent: Float[Array, "*latent"], new: Gaussian, old: Gaussian
) -> Float32[Array, ""]:
    """The ratio of GRPO-Guard (arXiv 2510.22319), as a logarithm, for one action.

    std * (log ratio + |new mean - old mean|^2 / (2 std^2)) without the cancellation:
    mean(noise of the action * (new mean - old mean)). Unlike the log ratio its mean
    over actions is 0. A deterministic step (std = 0) has ratio 1.
    """
    old_mean = jax.lax.stop_gradient(old.mean)
    away = jax.lax.stop_gradient(next_latent.astype(jnp.float32)) - old_mean
    stochastic = new.std > 0
    noise = away / jnp.where(stochastic, new.std, 1.0)
    return jnp.where(stochastic, jnp.mean(noise * (new.mean - old_mean)), 0.0)
