"""Draw several images and keep some: best-of-n, and CFG-Rejection."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference.search import setting as settings
from flowgrpo_jax.inference.search.setting import Result, Reward, Setting
from flowgrpo_jax.models.flow_model import with_and_without_text


def best_of_n(setting: Setting, reward: Reward, number: int) -> Result:
    """The best of the plain images of members 0 .. number - 1, by the reward."""
    if number < 1:
        raise UserError(f"number: {number}: must be at least 1")
    latents, evaluations = settings.plain(setting, range(number))
    images = settings.decode(setting, latents)
    scores = np.asarray(reward(images))
    best = slice(int(scores.argmax()), int(scores.argmax()) + 1)
    return Result(latents[best], images[best], scores[best], evaluations)


def cfg_rejection(
    setting: Setting,
    velocity: Callable[..., Array],
    guidance_scale: float,
    number: int,
    judged_steps: int = 10,
    share: float = 0.25,
) -> Result:
    """CFG-Rejection (arXiv 2505.23343): finish only what guidance moves the most.

    The accumulated score difference of a candidate is, over its first steps, the sum of

        |noise_hat_text - noise_hat_empty|^2 = ((1 - sigma) |v_text - v_empty|)^2

    (mean over latent dimensions): the scores' difference times the noise level, without
    which some steps would outweigh the rest. Candidates with a low one lie in sparse
    regions of the data and are poor. No reward takes part and guidance knows both
    velocities anyway, so a rejected candidate costs `judged_steps` and no more.

    Args:
      velocity: of the network without guidance (`FlowModel.velocity`); the sampler's is
        the guided one.
      guidance_scale: that of the sampler.
      number: candidates, members 0 .. number - 1.
      judged_steps: tau, the steps before the choice.
      share: of the candidates that is kept; at least one is.

    Raises:
      UserError: without guidance there is no difference.
    """
    if guidance_scale == 1.0:
        raise UserError(
            "guidance_scale: 1.0: cfg_rejection compares the model with and without "
            "the prompt: must be another one, such as 1.5"
        )
    if not 1 <= judged_steps < setting.num_steps:
        raise UserError(
            f"judged_steps: {judged_steps}: must be at least 1 and below the "
            f"{setting.num_steps} steps of an image"
        )
    kept = number_kept(number, share)
    latents = settings.noise(setting, range(number))
    score = jnp.zeros(number)
    for step in range(judged_steps):
        stochastic = setting.sampler.kind != "ode"
        fresh = (
            settings.noise(setting, range(number), step + 1) if stochastic else latents
        )
        judge = functools.partial(
            _judged_step,
            (setting.sampler, velocity, guidance_scale),
            setting.variables,
            setting.text,
            step,
        )
        latents, difference = settings.in_microbatches(
            judge, setting.microbatch, latents, fresh
        )
        score += difference
    order = np.argsort(-np.asarray(score), kind="stable")[:kept]
    clean, rest = settings.finish(setting, latents[order], order.tolist(), judged_steps)
    return Result(
        clean,
        settings.decode(setting, clean),
        np.asarray(score)[order],
        number * judged_steps + rest,
    )


def number_kept(number: int, share: float) -> int:
    """How many of so many candidates are above the quantile 1 - share."""
    if number < 1 or not 0 < share <= 1:
        raise UserError(
            f"keep: {share} of {number} candidates: must be above 0, at most 1, of at "
            "least one"
        )
    return math.ceil(share * number)


@functools.partial(jax.jit, static_argnums=0)
def _judged_step(
    static, variables, text, step, latents, fresh
) -> tuple[settings.Latents, Float[Array, " sample"]]:
    """One guided step of a microbatch and the squared differences there."""
    sampler, velocity, scale = static
    count = latents.shape[0]
    sigma = jnp.asarray(sampler.sigmas, jnp.float32)[step]
    with_text, without = with_and_without_text(
        velocity,
        variables,
        latents,
        jnp.full(count, sigma),
        *settings.rows(text, count),
    )
    difference = with_text - without
    after = settings.advance(
        sampler, latents, without + scale * difference, fresh, step
    )
    square = jnp.square((1 - sigma) * difference).reshape(count, -1)
    return after, square.mean(axis=1)
