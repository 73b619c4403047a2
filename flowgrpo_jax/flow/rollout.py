"""Sampling: noise to clean latents, and the stochastic transitions on the way.

One rollout of an iteration is one compiled program:
  1. every device walks over its microbatches (`lax.map`);
  2. in a microbatch one `lax.scan` runs down the sigmas: velocity, Gaussian of the
     step, draw;
  3. of all visited states only the transitions that will be trained are kept, and get
     their log-probs.
Where siblings share a state (plan "branch"), `branches` takes the place of 2 and 3:
the way to the shared state and the velocity there are computed once, then every
sibling draws its own next latent and goes on from it.
Noise is a pure function of (seed, iteration, prompt, member, step), so neither the
number of devices nor the size of the microbatch changes a sample's noise.
"""

import functools
import math
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
    """Trained transitions [update, batch, trained, slot]: one state, many actions."""

    latent: Float[Array, "*lead height width channel"]
    next_latent: Float[Array, "*lead sibling height width channel"]
    log_prob: Float[Array, "*lead sibling"]  # mean over latent dimensions
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
    key: Key[Array, ""], prompt: Int[Array, " sample"], member: Int[Array, " sample"]
) -> Key[Array, " sample"]:
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
    return jax.vmap(lambda k: _normal(jax.random.fold_in(k, 0), shape))(keys)


def step_noise(keys: Key[Array, " slot"], step: Int[Array, " slot"], shape) -> Array:
    """Fresh noise of one step of each sample; counter 0 is that of the initial noise."""

    def one(key, k):
        return _normal(jax.random.fold_in(key, k + 1), shape)

    return jax.vmap(one)(keys, step)


def _normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """jax.random.normal of that shape, at half its price: it counts one axis faster."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def step_arguments(sampler: Sampler, step: Int[Array, ""], stochastic) -> tuple:
    """(sigma, sigma_next, options) of one sample's step, as `transition` takes them."""
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    options = {
        "sigma_max": sigmas[1],
        "noise_level": sampler.noise_level * stochastic,
    }
    return sigmas[step], sigmas[step + 1], options


def draw(
    sampler: Sampler,
    latent: Float[Array, "slot height width channel"],
    velocity: Float[Array, "slot height width channel"],
    noise: Float[Array, "slot height width channel"],
    step: Int[Array, " slot"],
    stochastic: Float[Array, " slot"],
) -> Float[Array, "slot height width channel"]:
    """The next latent of each sample; an Euler step where `stochastic` is 0."""

    def one(x, v, fresh, k, switch):
        sigma, sigma_next, options = step_arguments(sampler, k, switch)
        gaussian = transition.gaussian(sampler.kind, x, v, sigma, sigma_next, **options)
        return transition.sample(gaussian, fresh)

    return jax.vmap(one)(latent, velocity, noise, step, stochastic)


def replay(
    sampler: Sampler,
    latent: Float[Array, "slot height width channel"],
    next_latent: Float[Array, "slot sibling height width channel"],
    velocity: Float[Array, "slot height width channel"],
    step: Int[Array, " slot"],
    stochastic: Float[Array, " slot"],
) -> tuple[Float[Array, "slot sibling"], transition.Gaussian]:
    """Log-probs (mean over latent dimensions) and Gaussian of each stored step.

    Rollout and update both call this, and nothing else, for log-probs. The barrier
    keeps them the same numbers in both: without it a compiler would fuse the log-prob
    with the draw here, fold constants there, and round the two differently; the first
    ratio would not be exactly 1.
    """
    latent, next_latent, velocity, step, stochastic = jax.lax.optimization_barrier(
        (latent, next_latent, velocity, step, stochastic)
    )

    def one(x, following, v, k, switch):
        sigma, sigma_next, options = step_arguments(sampler, k, switch)
        return transition.replay(
            sampler.kind, x, following, v, sigma, sigma_next, **options
        )

    return jax.vmap(one)(latent, next_latent, velocity, step, stochastic)


def trajectory(
    sampler: Sampler,
    variables: dict,
    noise: Float[Array, "slot height width channel"],
    keys: Key[Array, " slot"],
    stochastic: Float[Array, "slot step"],
    text: tuple,
) -> tuple[Array, Array, Array]:
    """One microbatch from noise to clean: (clean, states, velocities).

    States and velocities [step, slot, ...] are those at the start of each step. `text`
    is what the velocity takes after latents and sigma. The noise of all steps is made
    at once: in the loop its many small operations cost three times as much.
    """
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    slots = noise.shape[0]
    steps = jnp.arange(sampler.num_steps)
    fresh = jax.vmap(lambda k: step_noise(keys, jnp.full(slots, k), noise.shape[1:]))(
        steps
    )

    def body(latent, one_step):
        step, switch, drawn = one_step
        now = jnp.full(slots, step)
        velocity = sampler.velocity(variables, latent, sigmas[now], *text)
        return draw(sampler, latent, velocity, drawn, now, switch), (latent, velocity)

    clean, (states, velocities) = jax.lax.scan(
        body, noise, (steps, stochastic.T, fresh)
    )
    return clean, states, velocities


def euler(
    sampler: Sampler,
    variables: dict,
    latent: Float[Array, "slot height width channel"],
    start: Int[Array, " slot"],
    stop: Int[Array, " slot"],
    text: tuple,
) -> Float[Array, "slot height width channel"]:
    """Euler steps of one microbatch: each slot from its step `start` to its `stop`.

    The network runs from the first `start` to the last `stop`, so slots that stand
    together should be near in both; slots that are at their end cost nothing.
    """
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    never = jnp.zeros(latent.shape[0])

    def body(k, latent):
        steps = jnp.full(latent.shape[0], k)
        velocity = sampler.velocity(variables, latent, sigmas[steps], *text)
        following = draw(sampler, latent, velocity, latent, steps, never)
        moves = (start <= k) & (k < stop)
        return jnp.where(moves[:, None, None, None], following, latent)

    return jax.lax.fori_loop(jnp.min(start), jnp.max(stop), body, latent)


def branch(
    sampler: Sampler,
    variables: dict,
    key: Key[Array, ""],
    prompt: Int[Array, " slot"],
    member: Int[Array, "slot sibling"],
    step: Int[Array, " slot"],
    text: tuple,
    latent_shape: tuple[int, int, int],
) -> Transitions:
    """One microbatch of slots: the shared way to x_step, and each sibling's draw there.

    Fields [slot, ...], as `Transitions` without its first three axes.
    """
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    stochastic = jnp.ones(step.shape)
    noise = initial_noise(sampler, key, prompt, member[:, 0], latent_shape)
    latent = euler(sampler, variables, noise, jnp.zeros_like(step), step, text)
    velocity = sampler.velocity(variables, latent, sigmas[step], *text)

    def one_sibling(number):
        fresh = step_noise(sample_keys(key, prompt, number), step, latent_shape)
        return draw(sampler, latent, velocity, fresh, step, stochastic)

    following = jax.vmap(one_sibling, in_axes=1, out_axes=1)(member)
    log_prob, _ = replay(sampler, latent, following, velocity, step, stochastic)
    return Transitions(latent, following, log_prob, step)


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

    Clean latents are [update, batch, slot, sibling, ...]. `text_of` gives the
    velocity's text for prompt numbers [slot]. Local view: call it inside shard_map
    (or on one device) with this device's part of the layout.
    """
    lead = layout.prompt.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), layout)
    one_by_one = layout.member.shape[-1] == 1
    make = _independent if one_by_one else _branches
    made = make(sampler, variables, key, flat, tables, text_of, latent_shape)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), made)


def _independent(sampler, variables, key, layout, tables, text_of, latent_shape):
    """Every sample goes its own way from its first noise."""

    def one_batch(batch):
        prompt, member = batch
        noise = initial_noise(sampler, key, prompt, member, latent_shape)
        keys = sample_keys(key, prompt, member)
        stochastic = jnp.asarray(tables.stochastic)[prompt]
        clean, states, velocities = trajectory(
            sampler, variables, noise, keys, stochastic, text_of(prompt)
        )
        trained = jnp.asarray(tables.trained)[prompt].T  # [trained, slot]
        slot = jnp.arange(prompt.shape[0])
        states = jnp.concatenate([states, clean[None]])
        latent = states[trained, slot]
        following = states[trained + 1, slot][:, :, None]
        log_prob, _ = jax.vmap(functools.partial(replay, sampler))(
            latent,
            following,
            velocities[trained, slot],
            trained,
            jnp.ones(trained.shape, jnp.float32),
        )
        kept = Transitions(latent, following, log_prob, trained)
        return kept, clean[:, None]

    return jax.lax.map(one_batch, (layout.prompt, layout.member[..., 0]))


def _branches(sampler, variables, key, layout, tables, text_of, latent_shape):
    """Siblings share the way to their one stochastic step, and the velocity there."""

    def one_batch(batch):
        prompt, member = batch
        step = jnp.asarray(tables.trained)[prompt, 0]
        text = text_of(prompt)
        return branch(sampler, variables, key, prompt, member, step, text, latent_shape)

    made = jax.lax.map(one_batch, (layout.prompt, layout.member))

    # The rest of every sibling's way, in microbatches of as many images.
    siblings, slots = layout.member.shape[-1], layout.prompt.shape[-1]
    padding = layout.mask == 0  # is at its end already

    def one_rest(batch):
        latent, start, prompt = batch
        stop = jnp.full_like(start, sampler.num_steps)
        return euler(sampler, variables, latent, start, stop, text_of(prompt))

    drawn = made.next_latent
    start = jnp.where(padding, sampler.num_steps, made.step + 1)
    per_image = (
        jnp.repeat(values, siblings).reshape(-1, slots)
        for values in (start, layout.prompt)
    )
    images = drawn.reshape(-1, slots, *latent_shape)
    clean = jax.lax.map(one_rest, (images, *per_image)).reshape(drawn.shape)
    # One trained step per slot.
    return jax.tree.map(lambda x: x[:, None], made), clean
