"""Likelihood sources: what an objective learns about a stored action.

The source here replays one stored transition under the learner's velocity. It gives
the log-prob and the whole Gaussian, so that objectives that need means as well as
ratios (GRPO-Guard, DPPO) and penalties on means use the same replay.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.flow import transition


def replay(
    kind: str,
    latent: Float[Array, "*latent"],
    next_latent: Float[Array, "*latent"],
    velocity: Float[Array, "*latent"],
    sigma: transition.Scalar,
    sigma_next: transition.Scalar,
    *,
    sigma_max: transition.Scalar,
    noise_level: transition.Scalar,
) -> tuple[Float32[Array, ""], transition.Gaussian]:
    """Log-prob of latent -> next_latent under `velocity`, and its Gaussian.

    One sample; the arguments are those of `transition.gaussian`. The rollout must
    get its old log-prob from the same functions: then the first ratio is exactly 1.
    """
    step = transition.gaussian(
        kind,
        latent,
        velocity,
        sigma,
        sigma_next,
        sigma_max=sigma_max,
        noise_level=noise_level,
    )
    return transition.log_prob(kind, next_latent, step), step


def log_ratio(
    log_prob: Float[Array, "*element"], old_log_prob: Float[Array, "*element"]
) -> Float32[Array, "*element"]:
    """log(pi / pi_old), per latent dimension as log-probs are; 0 on-policy."""
    old_log_prob = jax.lax.stop_gradient(old_log_prob)
    return log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)
