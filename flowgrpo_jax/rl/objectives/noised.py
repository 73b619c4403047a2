"""Clean samples noised forward, and how far a velocity there is from its target.

What algorithms on clean samples share: only clean latents are needed, whatever solver
made them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Key

from flowgrpo_jax.rl.objectives.sigma_draws import Draw

Velocity = Float[Array, "sample height width channel"]
# Losses and measurements of a microbatch.
Score = tuple[Float32[Array, "slot sibling"], dict[str, Array]]


@struct.dataclass
class SampleElements:
    """Clean latents for forward-process objectives; leaves [slot, sibling, ...].

    Siblings are what the objective's grouping asks for: a group, a pair (best first),
    else there is one. `reward` is the raw weighted one.
    """

    clean: Float[Array, "*lead sibling height width channel"]
    advantage: Float[Array, "*lead sibling"]
    reward: Float[Array, "*lead sibling"]
    noise_key: Key[Array, "*lead sibling"]  # of this draw of the sample
    sample_key: Key[Array, "*lead sibling"]  # of all its draws
    draw: Int[Array, "*lead sibling"]  # the number of this one


class Noised(NamedTuple):
    """The latents at which the networks are asked; sample = slot * sibling."""

    latent: Float[Array, "sample height width channel"]
    sigma: Float[Array, " sample"]
    text: tuple
    clean: Float[Array, "sample height width channel"]
    noise: Float[Array, "sample height width channel"]
    shape: tuple[int, int]  # slot, sibling

    def error(self, velocity: Velocity) -> Float32[Array, "slot sibling"]:
        """`flow_matching_error` of a velocity."""
        error = flow_matching_error(velocity, self.clean, self.noise)
        return error.reshape(self.shape)

    def normalized_error(self, velocity: Velocity) -> Float32[Array, "slot sibling"]:
        """`self_normalized_error` of a velocity."""
        error = self_normalized_error(velocity, self.clean, self.noise)
        return error.reshape(self.shape)


def add_noise(
    draw_sigma: Callable[[Draw], Float32[Array, ""]],
    shared: bool,
    text: tuple,
    elements: SampleElements,
) -> Noised:
    """(1 - sigma) * clean + sigma * noise; with `shared`, alike for all siblings."""
    slots, siblings = elements.advantage.shape
    drawn = (elements.noise_key, elements.sample_key, elements.draw)
    if shared:
        drawn = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), drawn)
    clean = elements.clean.reshape(-1, *elements.clean.shape[2:])

    def draw(key, sample_key, number):
        keys = jax.random.split(key, 4)
        sigma = draw_sigma(Draw(keys[:3], sample_key, number))
        return sigma, jax.random.normal(keys[3], clean.shape[1:])

    sigma, noise = jax.vmap(draw)(*(x.reshape(-1) for x in drawn))
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


def flow_matching_error(
    velocity: Float[Array, " sample *latent"],
    data: Float[Array, " sample *latent"],
    noise: Float[Array, " sample *latent"],
) -> Float32[Array, " sample"]:
    """Mean over latent dimensions of (velocity - (noise - data))^2, per sample.

    The rectified-flow loss (Flow-GRPO, arXiv 2505.05470, eq. 1-2).
    """
    target = noise.astype(jnp.float32) - data.astype(jnp.float32)
    square = (velocity.astype(jnp.float32) - target) ** 2
    return jnp.mean(square, axis=range(1, square.ndim))


def self_normalized_error(
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
    error = flow_matching_error(velocity, data, noise)
    return error / jnp.maximum(scale, 1e-5)
