"""Sampling: the plans of an iteration carried out, from noise to clean latents.

One rollout is one compiled program:
  1. every device goes over its packs (`lax.map`);
  2. in each round one microbatch of the pack's rows takes its step from where its
     parents stand, and the network runs once;
  3. leaves take their last step; the trained actions get their log-probs.
Noise is a pure function of (seed, iteration, prompt, member, step), so neither the
number of devices nor the size of the microbatch changes a sample's noise.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from flowgrpo_jax.flow import transition
from flowgrpo_jax.flow.packing import Noise, Steps, Tables
from flowgrpo_jax.flow.plan import SHARED_MEMBER


@struct.dataclass
class Transitions:
    """Trained actions: one state, many actions. [pack, state, ...] of a rollout."""

    latent: Float[Array, "*lead height width channel"]
    next_latent: Float[Array, "*lead sibling height width channel"]
    log_prob: Float[Array, "*lead sibling"]  # mean over latent dimensions
    step: Int[Array, "*lead"]  # index of the sigma where the step starts
    stop: Int[Array, "*lead"]  # and of the one where it ends
    velocity: Float[Array, "*lead height width channel"] | None = None  # the old one


@struct.dataclass
class Rollout:
    """What a rollout gives, by pack; no transitions where no action is trained."""

    transitions: Transitions | None
    clean: Float[Array, "*pack leaf height width channel"]
    evaluations: Float[Array, "*pack"]  # of the network, counted as it ran
    rounds: Int[Array, "*pack"]


@struct.dataclass
class Sampler:
    """What a rollout needs beside weights and noise; static under jit.

    `noise_level` may have one level per step. `correlation` d makes the first noise
    of a member sqrt(1 - d^2) times the group's plus d times its own.
    """

    velocity: Callable = struct.field(pytree_node=False)
    sigmas: tuple[float, ...] = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)
    noise_level: float | tuple[float, ...] = struct.field(pytree_node=False)
    correlation: float | None = struct.field(pytree_node=False, default=None)
    keep_velocity: bool = struct.field(pytree_node=False, default=False)

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


def fresh_noise(
    sampler: Sampler, key: Key[Array, ""], noise: Noise, shape: tuple[int, ...]
) -> Float[Array, "row height width channel"]:
    """Standard normal noise of every row of the table.

    All at once: in the loop its many small operations would cost three times as much.
    """

    def one(sample_key, counter):
        # Drawn flat: it counts one axis faster, at half the price, the same numbers.
        flat = jax.random.normal(
            jax.random.fold_in(sample_key, counter), (math.prod(shape),)
        )
        return flat.reshape(shape)

    drawn = jax.vmap(one)(sample_keys(key, noise.prompt, noise.member), noise.counter)
    if sampler.correlation is None:
        return drawn
    own, zero = jnp.float32(sampler.correlation), jnp.zeros_like(noise.counter)
    of_group = jnp.full_like(noise.member, SHARED_MEMBER)
    shared = jax.vmap(one)(sample_keys(key, noise.prompt, of_group), zero)
    together = jnp.sqrt(1 - own**2) * shared + own * drawn
    first = (noise.counter == 0)[:, None, None, None]
    return jnp.where(first, together, drawn)


def step_arguments(sampler: Sampler, step, stop, stochastic) -> tuple:
    """(sigma, sigma_next, options) of one sample's step, as `transition` takes them."""
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    level = jnp.asarray(sampler.noise_level, jnp.float32)
    options = {
        "sigma_max": sigmas[1],
        "noise_level": (level[step] if level.ndim else level) * stochastic,
    }
    return sigmas[step], sigmas[stop], options


def draw(
    sampler: Sampler,
    latent: Float[Array, "slot height width channel"],
    velocity: Float[Array, "slot height width channel"],
    noise: Float[Array, "slot height width channel"],
    step: Int[Array, " slot"],
    stop: Int[Array, " slot"],
    stochastic: Float[Array, " slot"],
) -> Float[Array, "slot height width channel"]:
    """The next latent of each sample; an Euler step where `stochastic` is 0."""

    def one(x, v, fresh, start, end, switch):
        sigma, sigma_next, options = step_arguments(sampler, start, end, switch)
        gaussian = transition.gaussian(sampler.kind, x, v, sigma, sigma_next, **options)
        return transition.sample(gaussian, fresh)

    return jax.vmap(one)(latent, velocity, noise, step, stop, stochastic)


def log_probs(
    sampler: Sampler,
    latent: Float[Array, "slot height width channel"],
    next_latent: Float[Array, "slot sibling height width channel"],
    velocity: Float[Array, "slot height width channel"],
    step: Int[Array, " slot"],
    stop: Int[Array, " slot"],
    stochastic: Float[Array, " slot"],
) -> tuple[Float[Array, "slot sibling"], transition.Gaussian]:
    """Log-probs (mean over latent dimensions) and Gaussian of each stored step.

    Rollout and update both call this, and nothing else, for log-probs. The barrier
    keeps them the same numbers in both: without it a compiler would fuse the log-prob
    with the draw here, fold constants there, and round the two differently; the first
    ratio would not be exactly 1.
    """
    latent, next_latent, velocity, step, stop, stochastic = (
        jax.lax.optimization_barrier(
            (latent, next_latent, velocity, step, stop, stochastic)
        )
    )

    def one(x, following, v, start, end, switch):
        sigma, sigma_next, options = step_arguments(sampler, start, end, switch)
        return transition.log_probs(
            sampler.kind, x, following, v, sigma, sigma_next, **options
        )

    return jax.vmap(one)(latent, next_latent, velocity, step, stop, stochastic)


def rollout(
    sampler: Sampler,
    variables: dict,
    key: Key[Array, ""],
    tables: Tables,
    text_of: Callable[[Array], tuple],
    latent_shape: tuple[int, int, int],
    agree: Callable[[Array], Array] = lambda rounds: rounds,
) -> Rollout:
    """All packs of one device, one after the other.

    `text_of` gives the velocity's text for prompt numbers [slot]. Local view: call it
    inside shard_map (or on one device) with this device's part of the tables. Where
    devices share the parameters, `agree` tells how many rounds any of them needs: rows
    that a pack does not use are sampled and not read.
    """

    def one_pack(pack):
        pack = pack._replace(rounds=agree(pack.rounds))
        return _one_pack(sampler, variables, key, pack, text_of, latent_shape)

    return jax.lax.map(one_pack, tables)


def _one_pack(sampler, variables, key, pack: Tables, text_of, shape) -> Rollout:
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    rounds, slots = pack.prompt.shape
    empty = jnp.zeros((rounds * slots, *shape))
    noise = fresh_noise(sampler, key, pack.noise, shape)

    def one_round(carry):
        number, latents, velocities, count = carry
        steps = jax.tree.map(lambda column: column[number], pack.steps)
        latent = _advance(sampler, latents, velocities, noise, steps)
        text = text_of(pack.prompt[number])
        velocity = sampler.velocity(variables, latent, sigmas[steps.stop], *text)
        write = jax.lax.dynamic_update_slice_in_dim
        return (
            number + 1,
            write(latents, latent, number * slots, 0),
            write(velocities, velocity, number * slots, 0),
            count + jnp.sum(pack.used[number]),
        )

    start = (jnp.int32(0), empty, empty, jnp.float32(0))
    _, latents, velocities, count = jax.lax.while_loop(
        lambda carry: carry[0] < pack.rounds, one_round, start
    )

    clean = _advance(sampler, latents, velocities, noise, pack.leaf)
    transitions = _trained(sampler, pack, latents, velocities, clean)
    return Rollout(transitions, clean, count, pack.rounds)


def _advance(sampler, latents, velocities, noise, steps: Steps) -> Array:
    """Where the steps of one microbatch lead, from their parents' rows."""
    latent, velocity = latents[steps.parent], velocities[steps.parent]
    fresh = noise[steps.noise]
    reached = draw(
        sampler, latent, velocity, fresh, steps.start, steps.stop, steps.fresh
    )
    begins = (steps.start == steps.stop)[:, None, None, None]
    reached = jnp.where(begins, fresh, reached)
    if steps.before is None or steps.earlier is None:
        return reached
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    second = jax.vmap(transition.dpm_solver_2m)(
        latent,
        velocity,
        latents[steps.before],
        velocities[steps.before],
        sigmas[steps.start],
        sigmas[steps.stop],
        sigmas[steps.earlier],
    )
    curved = (steps.before != steps.parent)[:, None, None, None]
    return jnp.where(curved, second, reached)


def _trained(sampler, pack: Tables, latents, velocities, clean) -> Transitions | None:
    if not pack.state.size:
        return None
    rows = latents.shape[0]
    latent, velocity = latents[pack.state], velocities[pack.state]
    inside = jnp.minimum(pack.action, rows - 1)
    beyond = jnp.clip(pack.action - rows, 0, clean.shape[0] - 1)
    ends = (pack.action >= rows)[..., None, None, None]
    following = jnp.where(ends, clean[beyond], latents[inside])
    always = jnp.ones(pack.start.shape, jnp.float32)
    log_prob, _ = log_probs(
        sampler, latent, following, velocity, pack.start, pack.stop, always
    )
    return Transitions(
        latent=latent,
        next_latent=following,
        log_prob=log_prob,
        step=pack.start,
        stop=pack.stop,
        velocity=velocity if sampler.keep_velocity else None,
    )
