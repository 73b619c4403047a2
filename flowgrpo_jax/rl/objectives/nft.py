"""DiffusionNFT's objective: good samples draw the learner, bad ones its mirror image."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from flowgrpo_jax.rl.objectives.clipping import Clip, reward_probability
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.options import number
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange


@dataclass(frozen=True, kw_only=True)
class NftOptions(SigmaInRange):
    """`beta`: how far the two implicit policies are from the old one."""

    beta: float = number(1.0, above=True)


def nft(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: NftOptions,
) -> Score:
    """sigma * (r * error(v+) + (1 - r) * error(v-)) * adv_clip_max / beta.

    DiffusionNFT (arXiv 2509.16117), with v+- = v_old +- beta (v - v_old)
    and r the advantage as a probability. As released, errors are those of the
    predicted clean latent, sigma times those of the velocity, each over its own
    constant mean size, and the loss is scaled by adv_clip_max / beta.
    """
    # Written around v_old, both sides are v_old exactly when the learner is.
    old = fixed["old"].astype(jnp.float32)
    away = options.beta * (velocity.astype(jnp.float32) - old)
    sigma = noised.sigma.reshape(noised.shape)
    positive = noised.normalized_error(old + away)
    negative = noised.normalized_error(old - away)
    r = reward_probability(elements.advantage, clip.advantage)
    loss = sigma * (r * positive + (1 - r) * negative)
    loss = loss * (clip.advantage / options.beta)
    return loss, {"policy_loss": loss}
