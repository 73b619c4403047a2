"""CRD's objective: the implicit reward is regressed on the reward."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flowgrpo_jax.rl.objectives.clipping import Clip, reward_probability
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.options import number
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange


@dataclass(frozen=True, kw_only=True)
class CrdOptions(SigmaInRange):
    """`beta`: the scale of the implicit reward."""

    beta: float = number(1.0, above=True)


def crd(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: CrdOptions,
) -> Score:
    """(beta * (r - mean r) - (R - mean R))^2 * adv_clip_max / beta.

    Centred reward distillation (arXiv 2603.14128). The implicit reward r is how much
    better the learner matches a sample than the old policy, in self-normalised errors;
    R is the reward of DiffusionNFT, in [0, 1]. Centred within the group, the prompt's
    unknown normaliser cancels. No gradient flows through the group's mean.
    """
    better = noised.normalized_error(fixed["old"]) - noised.normalized_error(velocity)
    reward = reward_probability(elements.advantage, clip.advantage)
    mean = jax.lax.stop_gradient(jnp.mean(better, axis=1, keepdims=True))
    wanted = reward - jnp.mean(reward, axis=1, keepdims=True)
    loss = (options.beta * (better - mean) - wanted) ** 2
    loss = loss * (clip.advantage / options.beta)
    return loss, {"policy_loss": loss, "implicit_reward": better}
