"""Rollover Budget Forcing (arXiv 2503.19385): choose a particle at every step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import transition
from flowgrpo_jax.inference.search import interpolant as interpolants
from flowgrpo_jax.inference.search import setting as settings
from flowgrpo_jax.inference.search.setting import (
    Images,
    Latents,
    Result,
    Reward,
    Setting,
)

DIFFUSION = 3.0  # g_t = 3 t^2 (appendix F.1)


class _Particle(NamedTuple):
    """A latent [1, ...], what the network says there, and what that looks like."""

    latent: Latents
    clean: Latents
    eps: Latents
    image: Images
    score: float


def rollover_budget_forcing(
    setting: Setting,
    reward: Reward,
    budget: int,
    interpolant: str = "linear",
    diffusion: float = DIFFUSION,
) -> Result:
    """One image, found with exactly `budget` evaluations.

    The ODE becomes an SDE of the same marginals with g_t = diffusion t^2, on the linear
    or the variance-preserving ("vp") interpolant. The budget is shared out over the
    steps. At each one particles are drawn until the reward of one's x_0_hat beats the
    best so far; what is left rolls over to the next step. Where none does, the best
    of the step goes on. At the last step before the data nothing can be saved for
    later: all that is left is drawn (as in the authors' code), and the result is the
    best x_0_hat there. Particles go through the network one by one, since the next one
    is drawn only if this one fails.

    `history` tells the evaluations and the best reward so far after each step.
    Raises UserError for a budget below the number of steps, or a single step.
    """
    path = interpolants.get(interpolant)
    times = path.times(setting.sampler)
    quotas = _quotas(budget, len(times) - 1)
    look = functools.partial(
        _look, (interpolant, setting.sampler.velocity, setting.decode)
    )
    draw = functools.partial(
        _draw, (interpolant, setting.sampler.velocity, setting.decode, diffusion)
    )
    begin = settings.noise(setting, [0])
    seen = look(setting.variables, setting.text, begin, times[0])
    here = _scored(begin, seen, reward)
    best, spent, spare = here.score, 1, 0
    history = [(spent, best)]
    for step, quota in enumerate(quotas):
        last = step == len(quotas) - 1
        found, drawn = None, 0
        while drawn < quota + spare:
            fresh = settings.noise(setting, [drawn], step + 1)
            latent, seen = draw(
                setting.variables,
                setting.text,
                here.latent,
                here.clean,
                here.eps,
                times[step],
                times[step + 1],
                fresh,
            )
            particle = _scored(latent, seen, reward)
            drawn += 1
            if found is None or particle.score > found.score:
                found = particle
            if particle.score > best:
                best = particle.score
                if not last:
                    break
        assert found is not None  # quotas are at least 1
        here, spare, spent = found, quota + spare - drawn, spent + drawn
        history.append((spent, best))
    return Result(here.clean, here.image, np.array([here.score]), spent, tuple(history))


def _quotas(budget: int, num_steps: int) -> list[int]:
    """Evaluations of each step before the last, what does not divide first of all.

    One is for the noise; the last step, to x_0_hat, needs none.
    """
    steps = num_steps - 1
    if steps < 1:
        raise UserError(f"num_steps: {num_steps}: must be at least 2")
    if budget < num_steps:
        raise UserError(
            f"budget: {budget}: must be at least {num_steps}, the evaluations of one "
            "image"
        )
    each, more = divmod(budget - 1, steps)
    return [each + (step < more) for step in range(steps)]


def _scored(latent, seen, reward: Reward) -> _Particle:
    clean, eps, image = seen
    image = np.asarray(image)
    return _Particle(latent, clean, eps, image, float(reward(image)[0]))


@functools.partial(jax.jit, static_argnums=0)
def _look(static, variables, text, latent, time):
    """(x_0_hat, eps_hat, image of x_0_hat)."""
    name, velocity, decode = static
    clean, eps = interpolants.get(name).predict(
        velocity, variables, latent, time, settings.rows(text, latent.shape[0])
    )
    return clean, eps, decode(variables, clean)


@functools.partial(jax.jit, static_argnums=0)
def _draw(static, variables, text, latent, clean, eps, time, time_next, fresh):
    """A particle at the next time and what the network says there."""
    *model, diffusion = static
    time = jnp.float32(time)
    step = interpolants.get(model[0]).step(
        latent, clean, eps, time, time_next, diffusion * time**2
    )
    latent = transition.sample(step, fresh)
    return latent, _look(tuple(model), variables, text, latent, time_next)
