"""One denoising step: the Gaussian it draws from, its sample and its log-prob.

Every kind of step is the Euler step of the flow, plus a pull along the predicted
noise, plus fresh noise:

    mean = x + v * dt + pull * x1_hat        x1_hat = x + (1 - sigma) * v
    next = mean + std * noise                dt = sigma_next - sigma < 0

so a kind is three scalars, and at noise level 0, where pull and std are exactly
zero, all kinds are the same Euler step bit for bit. Functions are written for one
sample, to be vmapped, and compute in float32 whatever they are given: bfloat16
would destroy log-ratios, which are of order 1e-5.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Real

from flowgrpo_jax.errors import UserError

Scalar = Real[ArrayLike, ""]


@struct.dataclass
class Gaussian:
    """The distribution of the next latent; under vmap all fields gain an axis.

    `std` is that of the transition. `diffusion` is the coefficient sigma_t of the
    SDE, without sqrt(-dt), by which Flow-GRPO scales its KL penalty; for CPS, which
    is no SDE, it is `std`.
    """

    mean: Float32[Array, "*batch_and_latent"]
    std: Float32[Array, "*batch"]
    diffusion: Float32[Array, "*batch"]


class _Coefficients(NamedTuple):
    pull: Float32[Array, ""]
    std: Float32[Array, ""]
    diffusion: Float32[Array, ""]


def gaussian(
    kind: str,
    latent: Float[Array, "*latent"],
    velocity: Float[Array, "*latent"],
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    sigma_max: Scalar,
    noise_level: Scalar,
) -> Gaussian:
    """Distribution of the latent at `sigma_next`, given the velocity at `sigma`.

    `kind` is a key of TRANSITIONS; "cps" and "cps_gaussian" are one Gaussian and differ
    in their log-prob. `sigma_max` is the second sigma of the schedule: Flow-SDE uses it
    where sigma = 1 would divide by zero. `noise_level` may be traced, so that a mask
    can choose which steps are stochastic and a table how much.
    """
    coefficients = _transition(kind)
    latent, velocity, sigma, sigma_next, sigma_max, noise_level = (
        jnp.asarray(x, jnp.float32)
        for x in (latent, velocity, sigma, sigma_next, sigma_max, noise_level)
    )
    pull, std, diffusion = jax.lax.optimization_barrier(
        coefficients(sigma, sigma_next, sigma_max, noise_level)
    )
    euler = latent + velocity * (sigma_next - sigma)
    noise_hat = latent + (1 - sigma) * velocity
    mean = jax.lax.optimization_barrier(euler + pull * noise_hat)
    return Gaussian(mean=mean, std=std, diffusion=diffusion)


def sample(
    gaussian: Gaussian, noise: Float[Array, "*latent"]
) -> Float32[Array, "*latent"]:
    """The next latent, from standard normal noise."""
    return gaussian.mean + gaussian.std * noise.astype(jnp.float32)


def log_prob(
    kind: str, next_latent: Float[Array, "*latent"], gaussian: Gaussian
) -> Float32[Array, ""]:
    """Log-density of `next_latent`, averaged (not summed) over latent dimensions.

    "cps" drops the constants and 1 / (2 std^2), as its authors do (arXiv 2509.05952),
    and "cps_gaussian" keeps them. No gradient flows through `next_latent`. A
    deterministic step (std = 0) has no density; it gives 0 with zero gradient, hence a
    ratio of 1.
    """
    next_latent = jax.lax.stop_gradient(next_latent.astype(jnp.float32))
    stochastic = gaussian.std > 0
    # The inner where keeps the unused branch finite, so that its gradient is 0.
    std = jnp.where(stochastic, gaussian.std, 1.0)
    scale = 1.0 if kind == "cps" else std
    square = _mean_square((next_latent - gaussian.mean) / scale)
    if kind == "cps":
        density = -square
    else:
        density = -square / 2 - jnp.log(std) - jnp.log(2 * jnp.pi) / 2
    return jnp.where(stochastic, density, 0.0)


def _mean_square(error: Float[Array, "*latent"]) -> Float32[Array, ""]:
    """Mean of squares, added up in halves in an order of our own.

    A compiler's reduction takes the order that suits its layout, which differs between
    programs; a stored log-prob and the recomputed one would then not be the same bits.
    """
    terms = jax.lax.optimization_barrier(error.reshape(-1) ** 2)
    count = terms.size
    terms = jnp.pad(terms, (0, (1 << (count - 1).bit_length()) - count))
    while terms.size > 1:
        first, second = jnp.split(terms, 2)
        terms = first + second
    return terms[0] / count


def log_probs(
    kind: str,
    latent: Float[Array, "*latent"],
    next_latents: Float[Array, " sibling *latent"],
    velocity: Float[Array, "*latent"],
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    sigma_max: Scalar,
    noise_level: Scalar,
) -> tuple[Float32[Array, " sibling"], Gaussian]:
    """Log-probs of latent -> next_latents under `velocity`, and their Gaussian.

    One state, many actions; the arguments are those of `gaussian`. The rollout must
    get its old log-prob from the same functions: then the first ratio is exactly 1.
    """
    step = gaussian(
        kind,
        latent,
        velocity,
        sigma,
        sigma_next,
        sigma_max=sigma_max,
        noise_level=noise_level,
    )
    return jax.vmap(lambda following: log_prob(kind, following, step))(
        next_latents
    ), step


def gain(
    kind: str,
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    sigma_max: Scalar,
    noise_level: Scalar,
) -> Float32[Array, ""]:
    """How strongly a step's policy gradient pulls on the velocity there.

    At ratio 1 the loss -advantage * log_prob of a step drawn with `noise` has, over n
    latent dimensions, the gradient gain / n * advantage * noise by the velocity, with
    gain = -(d mean / d velocity) / std for a Gaussian; "cps" lacks 1 / (2 std^2). The
    papers that weigh steps (TempFlow-GRPO, arXiv 2508.04324; GRPO-Guard, arXiv
    2510.22319) undo its change over a schedule. Arguments are those of `gaussian`. A
    deterministic step has no log-prob and hence gain 0, also where the gain of its
    neighbours grows without bound.
    """
    sigma, sigma_next, sigma_max, noise_level = (
        jnp.asarray(x, jnp.float32) for x in (sigma, sigma_next, sigma_max, noise_level)
    )
    pull, std, _ = _transition(kind)(sigma, sigma_next, sigma_max, noise_level)
    mean_by_velocity = sigma_next - sigma + pull * (1 - sigma)
    stochastic = std > 0
    density = 2 * std if kind == "cps" else 1 / jnp.where(stochastic, std, 1.0)
    return jnp.where(stochastic, -mean_by_velocity * density, 0.0)


def dpm_solver_2m(
    latent: Float[Array, "*latent"],
    velocity: Float[Array, "*latent"],
    previous_latent: Float[Array, "*latent"],
    previous_velocity: Float[Array, "*latent"],
    sigma: Scalar,
    sigma_next: Scalar,
    sigma_previous: Scalar,
) -> Float32[Array, "*latent"]:
    """Deterministic second-order step: DPM-Solver++(2M) (arXiv 2211.01095, alg. 2).

    As in diffusers (multistep, midpoint): the prediction of the clean latent, data =
    x - sigma * v, is continued along the logarithm of (1 - sigma) / sigma from the
    evaluation before, at `sigma_previous`, to the middle of this step:

        data_hat = data + (data - previous_data) * h / (2 * h_previous)
        next = sigma_next / sigma * x + (1 - sigma_next / sigma) * data_hat

    With data in place of data_hat that is the Euler step, and so is this function where
    there is nothing to continue: if the evaluation before was at pure noise
    (`sigma_previous` 1: also what to pass for a first step, with any finite previous
    values), at the same `sigma`, and for the last step, to `sigma_next` 0. A step that
    is much longer than the one before in h, such as the last but one of the ten of
    `schedule.shifted_grid`, continues too far: the Euler step is better there.
    """
    latent, velocity, previous_latent, previous_velocity = (
        x.astype(jnp.float32)
        for x in (latent, velocity, previous_latent, previous_velocity)
    )
    sigma, sigma_next, sigma_previous = (
        jnp.asarray(x, jnp.float32) for x in (sigma, sigma_next, sigma_previous)
    )
    second_order = (sigma_previous < 1) & (sigma_previous > sigma) & (sigma_next > 0)
    # The inner wheres keep the unused branch finite.
    start = jnp.where(second_order, _log_snr_half(sigma), 0.0)
    step = jnp.where(second_order, _log_snr_half(sigma_next) - start, 0.0)
    step_before = jnp.where(second_order, start - _log_snr_half(sigma_previous), 1.0)

    change = (latent - sigma * velocity) - (
        previous_latent - sigma_previous * previous_velocity
    )
    share = (1 - sigma_next / sigma) * step / (2 * step_before)
    return latent + velocity * (sigma_next - sigma) + share * change


def _log_snr_half(sigma):
    """log((1 - sigma) / sigma), the lambda of DPM-Solver."""
    return jnp.log1p(-sigma) - jnp.log(sigma)


def _transition(kind: str) -> Callable[..., _Coefficients]:
    if kind not in TRANSITIONS:
        raise UserError(f"sde_type: {kind}: one of {', '.join(TRANSITIONS)}")
    return TRANSITIONS[kind]


def _ode(sigma, sigma_next, sigma_max, noise_level) -> _Coefficients:
    """The Euler step of the flow."""
    zero = jnp.zeros_like(sigma)
    return _Coefficients(zero, zero, zero)


def _flow_sde(sigma, sigma_next, sigma_max, noise_level) -> _Coefficients:
    """sigma_t = noise_level * sqrt(t / (1 - t)) (Flow-GRPO, arXiv 2505.05470)."""
    remaining = 1 - jnp.where(sigma == 1, sigma_max, sigma)
    return _sde(sigma, sigma_next, noise_level * jnp.sqrt(sigma / remaining))


def _dance(sigma, sigma_next, sigma_max, noise_level) -> _Coefficients:
    """sigma_t = noise_level (DanceGRPO, arXiv 2505.07818, has a constant one).

    With a noise level per step it is the psi(t) of DenseGRPO (arXiv 2601.20218).
    """
    return _sde(sigma, sigma_next, noise_level)


def _sde(sigma, sigma_next, diffusion) -> _Coefficients:
    """Euler-Maruyama step of the SDE with the flow's marginals (Flow-GRPO, eq. 7-8).

    dx = [v + sigma_t^2 / (2 t) * x1_hat] dt + sigma_t dw, for any sigma_t.
    """
    dt = sigma_next - sigma
    pull = diffusion**2 / (2 * sigma) * dt
    return _Coefficients(pull, diffusion * jnp.sqrt(-dt), diffusion)


def _cps(sigma, sigma_next, sigma_max, noise_level) -> _Coefficients:
    """Coefficients-preserving sampling (arXiv 2509.05952).

    The noise of amount sigma_next is rotated by an angle: a part cos(angle) of it
    stays the predicted one, a part sin(angle) is fresh. Level 1 renews all of it.
    """
    angle = noise_level * (jnp.pi / 2)
    std = sigma_next * jnp.sin(angle)
    return _Coefficients(sigma_next * (jnp.cos(angle) - 1), std, std)


TRANSITIONS: dict[str, Callable[..., _Coefficients]] = {
    "ode": _ode,
    "sde": _flow_sde,
    "cps": _cps,
    "dance": _dance,
    "cps_gaussian": _cps,
}
