"""Sampling: noise to clean latents, and the stochastic transitions on the way.

One rollout of an iteration is one compiled program:
  1. every device walks over its microbatches (`lax.map`);
  2. in a microbatch one `lax.scan` runs down the sigmas: velocity, Gaussian of the
     step, draw, log-prob;
  3. of all visited states only the transitions that will be trained are kept.
Noise is a pure function of (seed, iteration, prompt, member, step), so neither the
number of devices nor the size of the microbatch changes a sample's noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from flowgrpo_jax.flow import transition
from flowgrpo_jax.flow.layout import Layout
from flowgrpo_jax.flow.plan import Tables

# The member number from which a group that shares its first noise draws it.
SHARED_MEMBER = 2**31 - 1


@struct.dataclass
class Transitions:
    """Trained transitions, as [update, batch, trained, slot] and then the latent."""

    latent: Float[Array, "*lead height width channel"]
    next_latent: Float[Array, "*lead height width channel"]
    log_prob: Float[Array, "*lead"]  # mean over latent dimensions
    step: Int[Array, "*lead"]  # index into the sigmas


@struct.dataclass
class Sampler:
    """What a rollout needs beside weights and noise; static under jit."""

    velocity: Callable = struct.field(pytree_node=False)
    sigmas: tuple[float, ...] = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)
    noise_level: float = struct.field(pytree_node=False)
    shared_noise: bool = struct.field(pytree_node=False, default=False)

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


def sample_keys(
    key: Key[Array, ""], prompt: Int[Array, " slot"], member: Int[Array, " slot"]
) -> Key[Array, " slot"]:
    """One key per sample, from the iteration's key, its prompt and its member."""

    def one(p, m):
        return jax.random.fold_in(jax.random.fold_in(key, p), m)

    return jax.vmap(one)(prompt, member)


def initial_noise(
    sampler: Sampler,
    key: Key[Array, ""],
    prompt: Int[Array, " slot"],
    member: Int[Array, " slot"],
    shape: tuple[int, ...],
) -> Float[Array, "slot height width channel"]:
    """Standard normal start; the same for a whole group with `shared_noise`."""
    if sampler.shared_noise:
        member = jnp.full_like(member, SHARED_MEMBER)
    keys = sample_keys(key, prompt, member)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


def step_noise(keys: Key[Array, " slot"], step: Int[Array, ""], shape) -> Array:
    """Fresh noise of one step; counter 0 belongs to the initial noise."""
    return jax.vmap(
        lambda k: jax.random.normal(jax.random.fold_in(k, step + 1), shape)
    )(keys)


def gaussians(
    sampler: Sampler,
    latent: Float[Array, "slot height width channel"],
    velocity: Float[Array, "slot height width channel"],
    step: Int[Array, " slot"],
    stochastic: Float[Array, " slot"],
) -> transition.Gaussian:
    """The Gaussian of each sample's step; rollout and update both call this."""
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)

    def one(x, v, k, switch):
        return transition.gaussian(
            sampler.kind,
            x,
            v,
            sigmas[k],
            sigmas[k + 1],
            sigma_max=sigmas[1],
            noise_level=sampler.noise_level * switch,
        )

    return jax.vmap(one)(latent, velocity, step, stochastic)


def log_probs(
    sampler: Sampler, next_latent: Array, gaussian: transition.Gaussian
) -> Float[Array, " slot"]:
    """Log-prob of each sample's step (mean over latent dimensions)."""
    return jax.vmap(lambda n, g: transition.log_prob(sampler.kind, n, g))(
        next_latent, gaussian
    )


def trajectory(
    sampler: Sampler,
    variables: dict,
    noise: Float[Array, "slot height width channel"],
    keys: Key[Array, " slot"],
    stochastic: Float[Array, "slot step"],
    text: tuple,
) -> tuple[Array, Array, Array]:
    """One microbatch from noise to clean: (clean, states, log-probs).

    states [step, slot, ...] are those before each step. `text` is what the velocity
    takes after latents and sigma.
    """
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    slots = noise.shape[0]

    def body(latent, step_and_switch):
        step, switch = step_and_switch
        steps = jnp.full(slots, step)
        velocity = sampler.velocity(variables, latent, sigmas[steps], *text)
        gaussian = gaussians(sampler, latent, velocity, steps, switch)
        fresh = step_noise(keys, step, latent.shape[1:])
        following = jax.vmap(transition.sample)(gaussian, fresh)
        # The log-prob is made again from what will be stored, behind a barrier: fused
        # with the draw it would be rounded otherwise than in the update, and the
        # first ratio would not be exactly 1.
        latent, velocity, following = jax.lax.optimization_barrier(
            (latent, velocity, following)
        )
        gaussian = gaussians(sampler, latent, velocity, steps, switch)
        return following, (latent, log_probs(sampler, following, gaussian))

    steps = jnp.arange(sampler.num_steps)
    clean, (states, log_prob) = jax.lax.scan(body, noise, (steps, stochastic.T))
    return clean, states, log_prob


def rollout(
    sampler: Sampler,
    variables: dict,
    key: Key[Array, ""],
    layout: Layout,
    tables: Tables,
    text_of: Callable[[Array], tuple],
    latent_shape: tuple[int, int, int],
) -> tuple[Transitions, Array]:
    """All samples of one device: (trained transitions, clean latents).

    `text_of` gives the velocity's text for prompt numbers [slot]. Local view: call it
    inside shard_map (or on one device) with this device's part of the layout.
    """

    def one_batch(batch):
        prompt, member = batch
        noise = initial_noise(sampler, key, prompt, member, latent_shape)
        keys = sample_keys(key, prompt, member)
        stochastic = jnp.asarray(tables.stochastic)[prompt]
        clean, states, log_prob = trajectory(
            sampler, variables, noise, keys, stochastic, text_of(prompt)
        )
        trained = jnp.asarray(tables.trained)[prompt].T  # [trained, slot]
        slot = jnp.arange(prompt.shape[0])
        states = jnp.concatenate([states, clean[None]])
        kept = Transitions(
            latent=states[trained, slot],
            next_latent=states[trained + 1, slot],
            log_prob=log_prob[trained, slot],
            step=trained,
        )
        return kept, clean

    updates, batches = layout.prompt.shape[:2]
    flat = [jnp.reshape(x, (updates * batches, -1)) for x in layout[:2]]
    kept, clean = jax.lax.map(one_batch, tuple(flat))
    return jax.tree.map(
        lambda x: x.reshape(updates, batches, *x.shape[1:]), (kept, clean)
    )
