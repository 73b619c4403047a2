"""What every search works with: one prompt, its noise, the sampler and its price.

The price is counted in evaluations: one latent at one sigma through the sampler's
velocity. A guided evaluation, two passes of the network, counts once; rows that fill up
a microbatch do not count.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.packing import Noise

Images = Float[np.ndarray, "sample height width channel"]
# Images [sample, height, width, 3] in [0, 1] to one score each, on the host.
Reward = Callable[[Images], Float[np.ndarray, " sample"]]
Latents = Float[Array, "sample height width channel"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One prompt and the model that draws it.

    Attributes:
      sampler: velocity, schedule and transition, as `assemble` makes them.
      variables: the weights that the velocity takes.
      text: what it takes after sigma: one row for the prompt and what all samples
        share (the empty prompt); () for a velocity without text.
      decode: (variables, clean latents) to images in [0, 1]; traceable.
      key, prompt: member m's noise is that of the rollout for this prompt number.
      microbatch: latents that go through the network at once; one shape compiles once.
    """

    sampler: rollout.Sampler
    variables: Any
    text: tuple
    decode: Callable[[Any, Array], Array]
    latent_shape: tuple[int, int, int]
    key: Key[Array, ""]
    prompt: int = 0
    microbatch: int = 8

    @property
    def num_steps(self) -> int:
        return self.sampler.num_steps


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found, the best first, and what it cost.

    `history` has the evaluations spent and the best score at every stage of a search
    that has stages.
    """

    latents: Latents
    images: Images
    scores: Float[np.ndarray, " sample"]
    evaluations: int
    history: tuple[tuple[int, float], ...] = ()


def noise(setting: Setting, members: Sequence[int], counter: int = 0) -> Latents:
    """Standard normal noise of members: counter 0 to begin with, k + 1 for step k."""
    member = jnp.asarray(members, jnp.int32)
    prompt, counters = (jnp.full_like(member, n) for n in (setting.prompt, counter))
    return rollout.fresh_noise(
        setting.sampler,
        setting.key,
        Noise(prompt, member, counters),
        setting.latent_shape,
    )


def rows(text: tuple, count: int) -> tuple:
    """The text of `count` samples of one prompt."""
    if not text:
        return ()
    own = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), count, axis=0), text[0])
    return (own, *text[1:])


def advance(
    sampler: rollout.Sampler,
    latents: Latents,
    velocity: Latents,
    fresh: Latents,
    step: Int[Array, ""],
) -> Latents:
    """Where step number `step` of the sampler leads; an ODE's ignores `fresh`."""
    steps = jnp.full(latents.shape[0], step)
    always = jnp.ones(latents.shape[0])
    return rollout.draw(sampler, latents, velocity, fresh, steps, steps + 1, always)


def in_microbatches(function: Callable, size: int, *arrays: Array) -> Any:
    """`function` over the rows of arrays [sample, ...], always `size` rows at once."""
    count = arrays[0].shape[0]
    parts = []
    for start in range(0, count, size):
        chunk = [array[start : start + size] for array in arrays]
        fill = size - chunk[0].shape[0]
        # The first row again, and not zeros: those may be no input of the function.
        chunk = [jnp.concatenate([c, jnp.repeat(c[:1], fill, axis=0)]) for c in chunk]
        parts.append(function(*chunk))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows)[:count], *parts)


def finish(
    setting: Setting, latents: Latents, members: Sequence[int], first: int = 0
) -> tuple[Latents, int]:
    """Clean latents of members that stand before step `first`, and the evaluations."""
    sampler, stochastic = setting.sampler, setting.sampler.kind != "ode"
    for step in range(first, setting.num_steps):
        fresh = noise(setting, members, step + 1) if stochastic else latents
        latents = in_microbatches(
            functools.partial(_step, sampler, setting.variables, setting.text, step),
            setting.microbatch,
            latents,
            fresh,
        )
    return latents, len(members) * (setting.num_steps - first)


def plain(setting: Setting, members: Sequence[int]) -> tuple[Latents, int]:
    """Clean latents of members without any search, and the evaluations."""
    return finish(setting, noise(setting, members), members)


def decode(setting: Setting, latents: Latents) -> Images:
    """Images in [0, 1], on the host."""
    one_batch = functools.partial(_decode, setting.decode, setting.variables)
    return np.asarray(in_microbatches(one_batch, setting.microbatch, latents))


@functools.partial(jax.jit, static_argnums=0)
def _step(sampler, variables, text, step, latents, fresh):
    count = latents.shape[0]
    sigma = jnp.full(count, jnp.asarray(sampler.sigmas, jnp.float32)[step])
    velocity = sampler.velocity(variables, latents, sigma, *rows(text, count))
    return advance(sampler, latents, velocity, fresh, step)


@functools.partial(jax.jit, static_argnums=0)
def _decode(function, variables, latents):
    return function(variables, latents)
