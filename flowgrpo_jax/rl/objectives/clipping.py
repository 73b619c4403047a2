"""How far advantages and ratios may go: what algorithms with ratios share."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

Measurements = dict[str, Float32[Array, "*element"] | Bool[Array, "*element"]]


class Clip(NamedTuple):
    """Ratios stay within 1 - low and 1 + high, advantages within +-advantage."""

    low: float
    high: float
    advantage: float


def clip_advantage(
    advantage: Float[Array, "*element"], largest: float
) -> Float32[Array, "*element"]:
    """Advantages within +-largest."""
    return jnp.clip(advantage.astype(jnp.float32), -largest, largest)


def reward_probability(
    advantage: Float[Array, "*element"], adv_clip_max: float
) -> Float32[Array, "*element"]:
    """Advantages of +-adv_clip_max as 1 and 0, of 0 as 1/2 (DiffusionNFT, CRD)."""
    return clip_advantage(advantage, adv_clip_max) / (2 * adv_clip_max) + 0.5


def clipped_surrogate(
    log_ratio: Float32[Array, "*element"],
    advantage: Float[Array, "*#element"],
    clip: Clip,
) -> tuple[Float32[Array, "*element"], Measurements]:
    """max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)): PPO's loss, elementwise.

    PPO (arXiv 1707.06347) with the sign of a loss. Also returns the
    measurements of `measure_ratio`.
    """
    # Clipped as logarithms: in float32, 1 - 1e-5 is wrong by 0.1% of the range.
    low, high = jnp.log1p(-clip.low), jnp.log1p(clip.high)
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.exp(jnp.clip(log_ratio, low, high))
    advantage = clip_advantage(advantage, clip.advantage)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped_ratio)
    return loss, measure_ratio(log_ratio, log_ratio > high, log_ratio < low)


def measure_ratio(
    log_ratio: Float32[Array, "*element"],
    above: Bool[Array, "*element"],
    below: Bool[Array, "*element"],
) -> Measurements:
    """ratio, approx_kl = (log ratio)^2 / 2, and the flags of a trust region.

    clipfrac_gt_one and clipfrac_lt_one say where it held a ratio back that was above,
    or below, what it allows; clipfrac is either.
    """
    return {
        "ratio": jnp.exp(log_ratio),
        "approx_kl": log_ratio**2 / 2,
        "clipfrac": above | below,
        "clipfrac_gt_one": above,
        "clipfrac_lt_one": below,
    }
