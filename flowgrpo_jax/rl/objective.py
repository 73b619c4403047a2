"""Objectives: likelihoods or errors and advantages in, a loss per element out.

Nothing is averaged over samples here: the caller masks padding and takes the mean.
A new trust region on ratios is a row like `ppo_clip`: it makes its own log-ratio
and hands it to `clipped_surrogate`. Objectives on clean samples take flow-matching
errors, [slot, sibling] where siblings (a pair, a group) are compared.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from flowgrpo_jax.flow import rollout
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
    advantage = _clip(advantage, adv_clip_max)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped_ratio)
    return loss, _measure(log_ratio, log_ratio > high, log_ratio < low)


def dppo(
    log_ratio: Float32[Array, "*element"],
    divergence: Float[Array, "*#element"],
    advantage: Float[Array, "*#element"],
    threshold: float,
    adv_clip_max: float,
) -> tuple[Float32[Array, "*element"], Info]:
    """-A * ratio, no longer followed outwards from a policy that is already far.

    Flow-DPPO (arXiv 2606.11025): where the KL of the step from its old Gaussian has
    reached `threshold`, elements that would push the ratio further from 1 (above it
    with A > 0, below it with A < 0) are left out. The flags tell which they were.
    """
    advantage = _clip(advantage, adv_clip_max)
    far = divergence >= threshold
    above = far & (log_ratio > 0) & (advantage > 0)
    below = far & (log_ratio < 0) & (advantage < 0)
    loss = jnp.where(above | below, 0.0, -advantage * jnp.exp(log_ratio))
    return loss, _measure(log_ratio, above, below)


def policy_gradient(
    log_ratio: Float32[Array, "*element"],
    advantage: Float[Array, "*#element"],
    adv_clip_max: float,
) -> tuple[Float32[Array, "*element"], Info]:
    """REINFORCE: -A * log ratio, whose gradient is -A grad log pi at any ratio."""
    loss = -_clip(advantage, adv_clip_max) * log_ratio
    nowhere = jnp.zeros(loss.shape, bool)
    return loss, _measure(log_ratio, nowhere, nowhere)


def tempflow_weights(
    sampler: rollout.Sampler, trained_steps: Sequence[int] | None = None
) -> Float32[np.ndarray, " step"]:
    """The noise std of every step, over its mean: TempFlow-GRPO (arXiv 2508.04324).

    The mean is over `trained_steps`, or over all steps that are stochastic.
    """
    count = sampler.num_steps
    step, nothing = jnp.arange(count), jnp.zeros((count, 1, 1, 1))
    _, gaussian = rollout.replay(
        sampler, nothing, nothing[:, None], nothing, step, step + 1, jnp.ones(count)
    )
    std = np.asarray(gaussian.std)
    trained = std > 0 if trained_steps is None else list(trained_steps)
    return std / std[trained].mean()


def _clip(advantage, largest) -> Array:
    return jnp.clip(advantage.astype(jnp.float32), -largest, largest)


def _measure(log_ratio, above, below) -> Info:
    return {
        "ratio": jnp.exp(log_ratio),
        "approx_kl": log_ratio**2 / 2,
        "clipfrac": above | below,
        "clipfrac_gt_one": above,
        "clipfrac_lt_one": below,
    }


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


def self_normalized(
    velocity: Float[Array, " sample *latent"],
    data: Float[Array, " sample *latent"],
    noise: Float[Array, " sample *latent"],
) -> Float32[Array, " sample"]:
    """The flow-matching error over its own constant mean |velocity - target|.

    All samples then pull about as hard, however well they are matched (DiffusionNFT).
    """
    target = noise.astype(jnp.float32) - data.astype(jnp.float32)
    away = jnp.abs(velocity.astype(jnp.float32) - target)
    scale = jax.lax.stop_gradient(jnp.mean(away, axis=range(1, away.ndim)))
    error = flow_matching(velocity, data, noise)
    return error / jnp.maximum(scale, 1e-5)


def reward_probability(
    advantage: Float[Array, "*element"], adv_clip_max: float
) -> Float32[Array, "*element"]:
    """Advantages of +-adv_clip_max as 1 and 0, of 0 as 1/2 (DiffusionNFT, CRD)."""
    return _clip(advantage, adv_clip_max) / (2 * adv_clip_max) + 0.5


def nft(
    positive_error: Float[Array, "*element"],
    negative_error: Float[Array, "*element"],
    probability: Float[Array, "*element"],
) -> Float32[Array, "*element"]:
    """r * error(v+) + (1 - r) * error(v-): DiffusionNFT (arXiv 2509.16117).

    v+- = v_old +- beta (v - v_old): good samples draw the learner, bad ones draw its
    mirror image.
    """
    return probability * positive_error + (1 - probability) * negative_error


def dgpo(
    error: Float[Array, "slot sibling"],
    reference_error: Float[Array, "slot sibling"],
    advantage: Float[Array, "slot sibling"],
    beta: float,
    adv_clip_max: float,
) -> Float32[Array, "slot sibling"]:
    """gate * A * error: the group's Bradley-Terry preference, DGPO (arXiv 2510.08425).

    The group's constant gate is sigmoid(beta * mean_i A_i (error_i - reference_i)): it
    closes once the learner matches good samples better, bad ones worse than before.
    """
    advantage = _clip(advantage, adv_clip_max)
    preferred = jnp.mean(advantage * (error - reference_error), axis=1, keepdims=True)
    return jax.lax.stop_gradient(jax.nn.sigmoid(beta * preferred)) * advantage * error


def crd(
    implicit_reward: Float[Array, "slot sibling"],
    reward: Float[Array, "slot sibling"],
    beta: float,
) -> Float32[Array, "slot sibling"]:
    """(beta * centred implicit reward - centred reward)^2: CRD (arXiv 2603.14128).

    Centred within the group, the prompt's unknown normaliser cancels. No gradient
    flows through the group's mean.
    """
    mean = jax.lax.stop_gradient(jnp.mean(implicit_reward, axis=1, keepdims=True))
    wanted = reward - jnp.mean(reward, axis=1, keepdims=True)
    return (beta * (implicit_reward - mean) - wanted) ** 2


def dpo(
    error: Float[Array, "slot pair"],
    reference_error: Float[Array, "slot pair"],
    beta: float,
    rejection_scaling: bool = False,
    preference_weight: float = 0.0,
) -> Float32[Array, " slot"]:
    """-log sigmoid(-beta / 2 * (rise of the winner - rise of the loser)), per pair.

    Diffusion-DPO (arXiv 2311.12908) on flow-matching errors; a rise is error -
    reference error, number 0 of a pair has won. Two guards against winners that get
    less likely, after PG-DPO (arXiv 2511.19049; the exact forms are ours):
    `rejection_scaling` cuts the loser's gradient to the length of the winner's, and
    `preference_weight` times beta is the price of a winner's rise.
    """
    won, lost = error[:, 0], error[:, 1]
    if rejection_scaling:
        # A gradient of an error is as long as the error's root.
        scale = jnp.minimum(1.0, jnp.sqrt(won / jnp.maximum(lost, 1e-12)))
        scale, fixed = jax.lax.stop_gradient((scale, lost))
        lost = fixed + scale * (lost - fixed)
    rise = won - reference_error[:, 0]
    margin = rise - (lost - reference_error[:, 1])
    loss = jax.nn.softplus(beta / 2 * margin)
    return loss + preference_weight * beta * jax.nn.relu(rise)
