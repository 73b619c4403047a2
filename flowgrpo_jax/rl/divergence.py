"""How far the learner has moved from a reference, for one sample.

All are means over latent dimensions, like log-probs, and treat the reference as a
constant.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow.transition import Gaussian

FORMS_ON_MEANS = ("official", "paper")


def kl_on_means(
    form: str,
    mean: Float[Array, "*latent"],
    reference_mean: Float[Array, "*latent"],
    gaussian: Gaussian,
) -> Float32[Array, ""]:
    """KL between the steps of learner and reference (Flow-GRPO, after eq. 9).

    "paper" is the KL of two Gaussians of equal std, (difference)^2 / (2 std^2).
    "official" is what the released code optimises: it divides by the SDE's
    coefficient, 2 sigma_t^2, without |dt|, which weighs late steps more and makes
    its beta 0.04 a paper's beta 0.004 at 10 steps. For CPS both are the same.
    A deterministic step (std = 0) is not penalised.
    """
    if form not in FORMS_ON_MEANS:
        raise UserError(f"kl_form: {form}: one of {', '.join(FORMS_ON_MEANS)}")
    scale = gaussian.std if form == "paper" else gaussian.diffusion
    stochastic = scale > 0
    # The inner where keeps the unused branch finite, so that its gradient is 0.
    square = _mean_square(mean, reference_mean) / jnp.where(stochastic, scale, 1.0) ** 2
    return jnp.where(stochastic, square / 2, 0.0)


def kl_on_velocities(
    velocity: Float[Array, "*latent"], reference_velocity: Float[Array, "*latent"]
) -> Float32[Array, ""]:
    """(v - v_ref)^2: the same penalty without the weights of the steps."""
    return _mean_square(velocity, reference_velocity)


def norm_excess(
    velocity: Float[Array, "*latent"], reference_velocity: Float[Array, "*latent"]
) -> Float32[Array, ""]:
    """Squared hinge on |v| - |v_ref|, both root mean squares: 0 unless v is longer.

    Velocities that RL inflates degrade images that the reward does not see (NormGuard,
    arXiv 2606.27771, whose hinge this is up to the power and scale).
    """
    longer = _length(velocity) - _length(jax.lax.stop_gradient(reference_velocity))
    return jax.nn.relu(longer) ** 2


def _length(x) -> Float32[Array, ""]:
    # The floor keeps the root's gradient finite at 0.
    return jnp.sqrt(jnp.maximum(jnp.mean(x.astype(jnp.float32) ** 2), 1e-12))


def _mean_square(x, constant) -> Float32[Array, ""]:
    constant = jax.lax.stop_gradient(constant.astype(jnp.float32))
    return jnp.mean((x.astype(jnp.float32) - constant) ** 2)
