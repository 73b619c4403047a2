"""Flow matching on samples, each with a weight: SFT, RWR, ORW-CFM-W2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from flowgrpo_jax.rl.objectives.clipping import Clip
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.options import number
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange


@dataclass(frozen=True, kw_only=True)
class WeightedMatchingOptions(SigmaInRange):
    """What a sample counts; `tau` is of "exp_reward"."""

    weight: Literal["one", "reward", "exp_reward", "advantage"] = "one"
    tau: float = number(1.0)


def weighted_matching(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: WeightedMatchingOptions,
) -> Score:
    """weight * mean (v - (noise - clean))^2.

    "one" is SFT on the samples that were selected, "reward" is RWR (both baselines of
    Flow-GRPO, arXiv 2505.05470), "exp_reward" = exp(tau * reward) is ORW-CFM-W2
    (arXiv 2502.06061; its W2 bound is the penalty on velocities).
    """
    error = noised.error(velocity)
    info = {"flow_matching_loss": error}
    match options.weight:
        case "one":
            return error, info
        case "reward":
            factor = elements.reward
        case "exp_reward":
            factor = jnp.exp(options.tau * elements.reward)
        case "advantage":
            factor = jnp.clip(elements.advantage, -clip.advantage, clip.advantage)
    return factor * error, info
