"""Objectives: likelihoods and advantages in, a loss per element out.

Nothing is averaged over samples here: the caller masks padding and takes the mean.
A new trust region on ratios is a row like `ppo_clip`: it makes its own log-ratio
and hands it to `clipped_surrogate`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from flowgrpo_jax.rl import likelihood

Info = dict[str, Float32[Array, "*element"] | Bool[Array, "*element"]]


def ppo_clip(
    log_prob: Float[Array, "*element"],
    old_log_prob: Float[Array, "*element"],
    advantage: Float[Array, "*#element"],
    clip_range_low: float,
    clip_range_high: float,
    adv_clip_max: float,
) -> tuple[Float32[Array, "*element"], Info]:
    """PPO's clipped loss, elementwise; see `clipped_surrogate`."""
    return clipped_surrogate(
        likelihood.log_ratio(log_prob, old_log_prob),
        advantage,
        clip_range_low,
        clip_range_high,
        adv_clip_max,
    )


def clipped_surrogate(
    log_ratio: Float32[Array, "*element"],
    advantage: Float[Array, "*#element"],
    clip_range_low: float,
    clip_range_high: float,
    adv_clip_max: float,
) -> tuple[Float32[Array, "*element"], Info]:
    """max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)), A within +-adv_clip_max.

    Also returns per element: ratio, approx_kl = (log ratio)^2 / 2, and the flags
    clipfrac_gt_one, clipfrac_lt_one (ratio above, below its range) and clipfrac.
    """
    # Clipped as logarithms: in float32, 1 - 1e-5 is wrong by 0.1% of the range.
    low, high = jnp.log1p(-clip_range_low), jnp.log1p(clip_range_high)
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.exp(jnp.clip(log_ratio, low, high))
    advantage = jnp.clip(advantage.astype(jnp.float32), -adv_clip_max, adv_clip_max)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped_ratio)
    above, below = log_ratio > high, log_ratio < low
    info = {
        "ratio": ratio,
        "approx_kl": log_ratio**2 / 2,
        "clipfrac": above | below,
        "clipfrac_gt_one": above,
        "clipfrac_lt_one": below,
    }
    return loss, info


def flow_matching(
    velocity: Float[Array, " sample *latent"],
    data: Float[Array, " sample *latent"],
    noise: Float[Array, " sample *latent"],
    weight: Float[Array, " sample"] | float = 1.0,
) -> Float32[Array, " sample"]:
    """Mean over latent dimensions of (velocity - (noise - data))^2, per sample.

    The rectified-flow loss (Flow-GRPO, eq. 1-2), times `weight` (rewards, for RWR).
    """
    target = noise.astype(jnp.float32) - data.astype(jnp.float32)
    square = (velocity.astype(jnp.float32) - target) ** 2
    return weight * jnp.mean(square, axis=range(1, square.ndim))
