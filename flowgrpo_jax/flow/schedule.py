"""Noise schedules: the decreasing sigmas that a sampler visits.

A schedule with `num_steps` transitions has `num_steps + 1` nodes, from sigma = 1
(pure noise) down to sigma = 0 (data); the model is fed `timestep = 1000 * sigma`.
Everything is computed in float64 on the host and rounded to float32 once.
"""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Real

from flowgrpo_jax.errors import UserError

Sigmas = Float32[np.ndarray, " node"]

# Between these numbers of image tokens the shift that depends on them is interpolated.
_BASE_TOKENS, _MAX_TOKENS = 256, 4096
# Smallest sigma of the 1000-step training grid of diffusers, before its shift.
_GRID_SIGMA_MIN = 1e-3


def shift_sigma(
    sigma: Real[ArrayLike, "*shape"], shift: float
) -> Real[ArrayLike, "*shape"]:
    """Move sigmas towards noise: `shift * s / (1 + (shift - 1) * s)`.

    Keeps 0 and 1 in place. The shift for larger images of Esser et al. (arXiv
    2403.03206), in the precision of its argument.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def linear(num_steps: int) -> Sigmas:
    """Equally spaced sigmas."""
    return _linear(num_steps).astype(np.float32)


def shifted(num_steps: int, shift: float) -> Sigmas:
    """Equally spaced sigmas, shifted once: DanceGRPO, MixGRPO, G2RPO, Bagel."""
    nodes = shift_sigma(_linear(num_steps), _positive(shift))
    return np.asarray(nodes, np.float32)


def shifted_grid(num_steps: int, shift: float = 3.0, dynamic: bool = False) -> Sigmas:
    """Sigmas of diffusers' scheduler on its own grid, which it shifts twice.

    The scheduler shifts its training grid when it is made and, when asked for
    `num_steps` values between the ends of that grid, shifts those again. So the
    last step before the data starts at sigma = 0.0089 for a shift of 3. A `dynamic`
    shift, one that depends on the image's size, is not yet known when the grid is made.
    """
    _check_num_steps(num_steps)
    early = 1.0 if dynamic else _positive(shift)
    sigma_min = shift_sigma(np.float64(_GRID_SIGMA_MIN), early)
    nodes = shift_sigma(np.linspace(1, sigma_min, num_steps), shift)
    return np.append(nodes, 0).astype(np.float32)


def by_tokens(
    num_steps: int,
    image_tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Sigmas:
    """Sigmas shifted by `exp(mu)`, more for larger images (Black Forest Labs, 2024).

    `mu` goes linearly from `base_shift` at 256 image tokens to `max_shift` at 4096
    tokens; an image of H x W pixels has (H / 16) * (W / 16) of them.
    """
    slope = (max_shift - base_shift) / (_MAX_TOKENS - _BASE_TOKENS)
    mu = base_shift + slope * (image_tokens - _BASE_TOKENS)
    return shifted(num_steps, float(np.exp(mu)))


# What `sample.schedule` may be; "model" is the one of the model's own scheduler.
SCHEDULES = ("model", "linear", "shifted", "by_tokens")


def _linear(num_steps: int) -> Float[np.ndarray, " node"]:
    _check_num_steps(num_steps)
    return np.linspace(1, 0, num_steps + 1)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps}: at least 1")


def _positive(shift: float) -> float:
    if not shift > 0:
        raise UserError(f"shift: {shift}: above 0")
    return shift
