"""Losses on clean samples: noise them forward, ask the network, compare.

Only clean latents are needed, whatever solver made them. A score takes the learner's
velocity at the noised latents, those of the fixed policies that it needs, and the
elements; it returns losses and measurements [slot, sibling]. Its keyword-only
arguments, but for `clip`, are the objective's options.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Key

from flowgrpo_jax.flow.schedule import shift_sigma
from flowgrpo_jax.rl import likelihood, objective

Score = tuple[Float32[Array, "slot sibling"], dict[str, Array]]
Velocity = Float[Array, "sample height width channel"]


class Clip(NamedTuple):
    """Ratios stay within 1 - low and 1 + high, advantages within +-advantage."""

    low: float
    high: float
    advantage: float


@struct.dataclass
class SampleElements:
    """Clean latents for forward-process objectives; leaves [slot, sibling, ...].

    Siblings must be together: a group, a pair (best first), else there is one.
    `reward` is the raw weighted one.
    """

    clean: Float[Array, "*lead sibling height width channel"]
    advantage: Float[Array, "*lead sibling"]
    reward: Float[Array, "*lead sibling"]
    noise_key: Key[Array, "*lead sibling"]


class Noised(NamedTuple):
    """The latents at which the networks are asked; sample = slot * sibling."""

    latent: Float[Array, "sample height width channel"]
    sigma: Float[Array, " sample"]
    text: tuple
    clean: Float[Array, "sample height width channel"]
    noise: Float[Array, "sample height width channel"]
    shape: tuple[int, int]  # slot, sibling

    def error(self, velocity: Velocity) -> Float32[Array, "slot sibling"]:
        """Flow-matching error of a velocity: mean (v - (noise - clean))^2."""
        error = objective.flow_matching(velocity, self.clean, self.noise)
        return error.reshape(self.shape)

    def normalized_error(self, velocity: Velocity) -> Float32[Array, "slot sibling"]:
        """The same over its own constant mean absolute error."""
        error = objective.self_normalized(velocity, self.clean, self.noise)
        return error.reshape(self.shape)


def sigma_in_range(
    keys: Key[Array, " three"],
    *,
    sigma: Literal["uniform", "logit_normal"] = "uniform",
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
) -> Float32[Array, ""]:
    """A sigma between two bounds, uniform or more often near their middle."""
    if sigma == "uniform":
        unit = jax.random.uniform(keys[0])
    else:
        unit = jax.nn.sigmoid(jax.random.normal(keys[0]))
    return sigma_min + (sigma_max - sigma_min) * unit


def pretraining_sigma(
    keys: Key[Array, " three"], *, shift: float, uniform_share: float = 0.1
) -> Float32[Array, ""]:
    """Logit-normal (Esser et al. 2024), shifted to higher noise as in sampling.

    A share of draws is uniform, so that no sigma is left out.
    """
    sigma = shift_sigma(jax.nn.sigmoid(jax.random.normal(keys[0])), shift)
    flat = jax.random.uniform(keys[1])
    return jnp.where(jax.random.uniform(keys[2]) < uniform_share, flat, sigma)


def add_noise(
    draw_sigma: Callable, shared: bool, text: tuple, elements: SampleElements
) -> Noised:
    """(1 - sigma) * clean + sigma * noise; with `shared`, alike for all siblings."""
    slots, siblings = elements.advantage.shape
    keys = elements.noise_key
    if shared:
        keys = jnp.broadcast_to(keys[:, :1], keys.shape)
    clean = elements.clean.reshape(-1, *elements.clean.shape[2:])

    def draw(key):
        keys = jax.random.split(key, 4)
        return draw_sigma(keys[:3]), jax.random.normal(keys[3], clean.shape[1:])

    sigma, noise = jax.vmap(draw)(keys.reshape(-1))
    level = sigma[:, None, None, None]
    latent = (1 - level) * clean + level * noise
    text = _repeat(text, siblings)
    return Noised(latent, sigma, text, clean, noise, (slots, siblings))


def _repeat(text: tuple, siblings: int) -> tuple:
    """Text has one row per slot; siblings share it. What follows is no rows."""
    if siblings == 1:
        return text
    rows = jax.tree.map(lambda x: jnp.repeat(x, siblings, axis=0), text[:1])
    return (*rows, *text[1:])


def weighted_matching(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    weight: Literal["one", "reward", "exp_reward", "advantage"] = "one",
    tau: float = 1.0,
) -> Score:
    """weight * flow-matching error.

    "one" is SFT on the samples that were selected, "reward" is RWR (Flow-GRPO's
    baselines, arXiv 2505.05470), "exp_reward" = exp(tau * reward) is ORW-CFM-W2
    (arXiv 2502.06061; its W2 bound is the penalty on velocities).
    """
    error = noised.error(velocity)
    info = {"flow_matching_loss": error}
    match weight:
        case "one":
            return error, info
        case "reward":
            factor = elements.reward
        case "exp_reward":
            factor = jnp.exp(tau * elements.reward)
        case "advantage":
            factor = jnp.clip(elements.advantage, -clip.advantage, clip.advantage)
    return factor * error, info


def flow_matching(noised, velocity, fixed, elements, *, clip: Clip) -> Score:
    """Rectified-flow regression on clean latents, as base models are pretrained."""
    return weighted_matching(noised, velocity, fixed, elements, clip=clip)


def nft(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    beta: float = 1.0,
) -> Score:
    """DiffusionNFT (arXiv 2509.16117); see `objective.nft`.

    Errors are those of the predicted clean latent, sigma times those of the velocity,
    normalised by their own mean; the loss is scaled by adv_clip_max / beta.
    """
    # Written around v_old, both sides are v_old exactly when the learner is.
    old = fixed["old"].astype(jnp.float32)
    away = beta * (velocity.astype(jnp.float32) - old)
    sigma = noised.sigma.reshape(noised.shape)
    loss = sigma * objective.nft(
        noised.normalized_error(old + away),
        noised.normalized_error(old - away),
        objective.reward_probability(elements.advantage, clip.advantage),
    )
    loss = loss * (clip.advantage / beta)
    return loss, {"policy_loss": loss}


def awm(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    weighting: likelihood.Weighting = "ghuber",
) -> Score:
    """Advantage Weighted Matching (arXiv 2509.25050): PPO on matching likelihoods.

    Learner and behaviour policy are compared at the same sigma and noise. Advantages
    are scaled to +-1.
    """
    sigma = noised.sigma.reshape(noised.shape)
    new, old = (
        likelihood.matching_log_prob(noised.error(v), sigma, weighting)
        for v in (velocity, fixed["old"])
    )
    advantage = elements.advantage / clip.advantage
    loss, info = objective.ppo_clip(new, old, advantage, clip.low, clip.high, 1.0)
    gap = jnp.abs(likelihood.log_ratio(new, old))
    return loss, info | {"policy_loss": loss, "ratio_gap": gap}


def dgpo(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    beta: float = 100.0,
) -> Score:
    """DGPO (arXiv 2510.08425), a group in a slot; see `objective.dgpo`."""
    error, reference = noised.error(velocity), noised.error(fixed["frozen"])
    loss = objective.dgpo(error, reference, elements.advantage, beta, clip.advantage)
    return loss, {"policy_loss": loss, "flow_matching_loss": error}


def crd(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    beta: float = 1.0,
) -> Score:
    """Centred reward distillation (arXiv 2603.14128), a group in a slot.

    The implicit reward is how much better the learner matches a sample than the old
    policy, in self-normalised errors; the reward is that of DiffusionNFT, in [0, 1].
    The loss is scaled by adv_clip_max / beta. See `objective.crd`.
    """
    better = noised.normalized_error(fixed["old"]) - noised.normalized_error(velocity)
    reward = objective.reward_probability(elements.advantage, clip.advantage)
    loss = objective.crd(better, reward, beta) * (clip.advantage / beta)
    return loss, {"policy_loss": loss, "implicit_reward": better}


def dpo(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    *,
    clip: Clip,
    beta: float = 100.0,
    rejection_scaling: bool = False,
    preference_weight: float = 0.0,
) -> Score:
    """Diffusion-DPO against the behaviour policy, a pair in a slot; see `objective.dpo`.

    Both of a pair carry the pair's loss, so that the mean is one over pairs.
    """
    error = noised.error(velocity)
    reference = noised.error(fixed["old"])
    loss = objective.dpo(error, reference, beta, rejection_scaling, preference_weight)
    loss = jnp.broadcast_to(loss[:, None], noised.shape)
    return loss, {"policy_loss": loss, "flow_matching_loss": error}
