"""Likelihoods: what an objective learns about a stored action.

The log-prob of a stored transition under the learner's velocity comes from
`flow.rollout.replay`, the function that gave the old one; objectives that need means
as well as ratios (GRPO-Guard, DPPO) find them in the Gaussian it returns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def log_ratio(
    log_prob: Float[Array, "*element"], old_log_prob: Float[Array, "*element"]
) -> Float32[Array, "*element"]:
    """log(pi / pi_old), per latent dimension as log-probs are; 0 on-policy."""
    old_log_prob = jax.lax.stop_gradient(old_log_prob)
    return log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)
