"""Direct Noise Optimisation (arXiv 2405.18881): gradient ascent on a sample's noise."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference.search import setting as settings
from flowgrpo_jax.inference.search.setting import Result, Setting

# Images [sample, height, width, 3] in [0, 1] to one score each, in JAX.
SmoothReward = Callable[[Array], Float[Array, " sample"]]


def brightness(
    images: Float[Array, "sample height width 3"],
) -> Float[Array, " sample"]:
    """Mean of all pixels: a reward for demonstrations, as in the paper."""
    return images.mean(axis=(1, 2, 3))


def darkness(images: Float[Array, "sample height width 3"]) -> Float[Array, " sample"]:
    """1 - brightness."""
    return 1 - brightness(images)


REWARDS: dict[str, SmoothReward] = {"brightness": brightness, "darkness": darkness}


class Options(NamedTuple):
    """The numbers of the optimisation.

    `regularization` is gamma, the weight of `noise_regularizer`; `block` and `shuffles`
    are its. The paper's learning rate is 0.01, for a hundred iterations of the noise
    of fifty steps; one ODE's noise can take larger steps.
    """

    learning_rate: float = 0.05
    regularization: float = 0.1
    block: int = 4
    shuffles: int = 100


_DEFAULTS = Options()


def noise_optimization(
    setting: Setting,
    reward: SmoothReward,
    iterations: int,
    options: Options = _DEFAULTS,
) -> Result:
    """The image of member 0 after ascent on reward - gamma * regulariser.

    All noise that the sampler takes is optimised by Adam: the first one and, unless the
    sampler is an ODE, that of every step. An iterate costs as many evaluations as an
    image, each with its gradient (and, to save memory, a recomputation, not counted).
    The first iterate is the plain sample; the result is the best of them all by
    that sum, so `iterations` - 1 updates were made at most. `history` tells the
    reward of each.
    UserError if the reward cannot be differentiated by JAX.
    """
    if iterations < 1:
        raise UserError(f"iterations: {iterations}: must be at least 1")
    first = settings.noise(setting, [0])
    image = jax.eval_shape(setting.decode, setting.variables, first)
    check_differentiable(reward, image)
    count = 1 if setting.sampler.kind == "ode" else 1 + setting.num_steps
    noises = jnp.concatenate([settings.noise(setting, [0], k) for k in range(count)])
    state = optax.adam(options.learning_rate).init(noises)
    static = (setting.sampler, setting.decode, reward, options)
    best, history, evaluations = None, [], 0
    for iteration in range(iterations):
        shuffling = jax.random.fold_in(setting.key, iteration)
        noises, state, seen = _improve(
            static, setting.variables, setting.text, noises, state, shuffling
        )
        evaluations += setting.num_steps
        value, score = float(seen[0]), float(seen[1])
        history.append((evaluations, score))
        if best is None or value > best[0]:
            best = (value, score, seen[2])
    assert best is not None
    return Result(
        best[2],
        settings.decode(setting, best[2]),
        np.array([best[1]]),
        evaluations,
        tuple(history),
    )


def check_differentiable(reward: SmoothReward, images: jax.ShapeDtypeStruct) -> None:
    """UserError unless JAX can trace the reward for images of this shape."""
    try:
        jax.eval_shape(jax.grad(lambda x: reward(x).sum()), images)
    except (jax.errors.JAXTypeError, TypeError, AttributeError) as error:
        name = getattr(reward, "__name__", str(reward))
        raise UserError(
            f"reward: {name}: cannot be differentiated by JAX, which "
            "noise_optimization needs"
        ) from error


def noise_regularizer(
    noise: Float[Array, "*shape"],
    key: Key[Array, ""],
    block: int = 4,
    shuffles: int = 100,
) -> Float[Array, ""]:
    """How unlikely noise is to be standard normal; about 0 if it well may be.

    Cut into m blocks of k numbers, a Gaussian's empirical mean and covariance
    concentrate (lemma 2 of the paper):

        P(|mean| > M)                      < p1 = min(1, 2 exp(-m M^2 / (2 k)))
        P(|covariance - 1| > M) (spectral) < p2
          = min(1, 2 exp(-m max(sqrt(1 + M) - 1 - sqrt(k / m), 0)^2 / 2))

    The value is -log(p1 p2) at what is observed, for the numbers as they stand plus the
    mean over random shuffles (which see numbers apart from their place). What does
    not fill a block is left out.
    """
    flat = noise.reshape(-1)
    if flat.size < 2 * block:
        raise UserError(f"block: {block}: must be at most half of {flat.size} numbers")
    flat = flat[: flat.size // block * block]

    def shuffled(shuffle_key):
        return _surprise(jax.random.permutation(shuffle_key, flat), block)

    keys = jax.random.split(key, shuffles)
    return _surprise(flat, block) + jax.vmap(shuffled)(keys).mean()


def _surprise(flat: Float[Array, " number"], block: int) -> Float[Array, ""]:
    """-log(p1 p2) of numbers in their order."""
    blocks = flat.reshape(-1, block)
    many = blocks.shape[0]
    square_mean = jnp.sum(blocks.mean(axis=0) ** 2)
    deviation = _spectral_norm(blocks.T @ blocks / many - jnp.eye(block))
    beyond = jnp.sqrt(1 + deviation) - 1 - (block / many) ** 0.5
    log_two = jnp.log(2.0)
    log_p1 = jnp.minimum(log_two - many * square_mean / (2 * block), 0)
    log_p2 = jnp.minimum(log_two - many * jnp.maximum(beyond, 0) ** 2 / 2, 0)
    return -(log_p1 + log_p2)


def _spectral_norm(matrix: Float[Array, "row row"]) -> Float[Array, ""]:
    """Largest |eigenvalue| of a symmetric matrix.

    A change of the eigenvector does not change it to first order; leaving it out of the
    gradient avoids the division by zero where eigenvalues are equal.
    """
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(matrix))
    vector = vectors[:, jnp.argmax(jnp.abs(values))]
    return jnp.abs(vector @ matrix @ vector)


@functools.partial(jax.jit, static_argnums=0)
def _improve(static, variables, text, noises, state, key):
    """(noises after one update, optimizer state, (objective, reward, latent) before)."""
    sampler, decode, reward, options = static

    def loss(noises):
        latent = _sample(sampler, variables, text, noises)
        score = reward(decode(variables, latent))[0]
        surprise = noise_regularizer(noises, key, options.block, options.shuffles)
        return options.regularization * surprise - score, (score, latent)

    (value, (score, latent)), gradient = jax.value_and_grad(loss, has_aux=True)(noises)
    optimizer = optax.adam(options.learning_rate)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(noises, updates), state, (-value, score, latent)


def _sample(sampler, variables, text, noises) -> settings.Latents:
    """The clean latent [1, ...] that noises [1 or 1 + step, ...] lead to.

    Of the steps only the latents between them are kept for the gradient.
    """
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    steps = jnp.arange(sampler.num_steps)
    fresh = jnp.zeros_like(noises, shape=(len(steps), *noises.shape[1:]))
    if len(noises) > 1:
        fresh = noises[1:]

    @jax.checkpoint
    def one(latent, inputs):
        step, noise = inputs
        velocity = sampler.velocity(
            variables, latent, sigmas[step][None], *settings.rows(text, 1)
        )
        return settings.advance(sampler, latent, velocity, noise[None], step), None

    return jax.lax.scan(one, noises[:1], (steps, fresh))[0]
