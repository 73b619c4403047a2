"""Advantage Weighted Matching: PPO on how well clean samples are matched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.rl.likelihood import log_ratio
from flowgrpo_jax.rl.objectives.clipping import Clip, clipped_surrogate
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


@dataclass(frozen=True, kw_only=True)
class AwmOptions(SigmaInRange):
    """`weighting`: see `matching_log_prob`."""

    weighting: Weighting = "ghuber"


def awm(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: AwmOptions,
) -> Score:
    """max(-A * rho, -A * clip(rho)), log rho = w(error_old, sigma) - w(error, sigma).

    Advantage Weighted Matching (arXiv 2509.25050): PPO, where `matching_log_prob`
    stands for log-probs. Learner and behaviour policy are compared at the same sigma
    and noise. Advantages are scaled to +-1.
    """
    sigma = noised.sigma.reshape(noised.shape)
    new, old = (
        matching_log_prob(noised.error(v), sigma, options.weighting)
        for v in (velocity, fixed["old"])
    )
    advantage = elements.advantage / clip.advantage
    ratio = log_ratio(new, old)
    loss, info = clipped_surrogate(ratio, advantage, clip._replace(advantage=1.0))
    return loss, info | {"policy_loss": loss, "ratio_gap": jnp.abs(ratio)}


def matching_log_prob(
    error: Float[Array, "*element"],
    sigma: Float[Array, "*element"],
    weighting: Weighting,
) -> Float32[Array, "*element"]:
    """-w(error, sigma): stands for the log-prob of a clean sample (arXiv 2509.25050).

    `error` is the flow-matching error, mean (v - (noise - data))^2, at that sigma.
    "huber" is its root, "ghuber" four times its fourth root, both shifted to 0 at 0.
    """
    tiny = 1e-10
    error = error.astype(jnp.float32)
    match weighting:
        case "uniform":
            weighted = error
        case "t":
            weighted = error * sigma
        case "t2":
            weighted = error * sigma**2
        case "huber":
            weighted = (jnp.sqrt(error + tiny) - tiny**0.5) * sigma
        case "ghuber":
            weighted = ((error + tiny) ** 0.25 - tiny**0.25) * sigma / 0.25
    return -weighted
