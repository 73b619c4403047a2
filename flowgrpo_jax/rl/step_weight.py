"""Step weights: how much each step of a trajectory counts in the loss."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from flowgrpo_jax.flow import rollout

STEP_WEIGHTS = ("none", "std")  # "std" is `tempflow_weights`


def tempflow_weights(
    sampler: rollout.Sampler, trained_steps: Sequence[int] | None = None
) -> Float32[np.ndarray, " step"]:
    """The noise std of every step, over its mean: TempFlow-GRPO (arXiv 2508.04324).

    The mean is over `trained_steps`, or over all steps that are stochastic.
    """
    count = sampler.num_steps
    step, nothing = jnp.arange(count), jnp.zeros((count, 1, 1, 1))
    _, gaussian = rollout.log_probs(
        sampler, nothing, nothing[:, None], nothing, step, step + 1, jnp.ones(count)
    )
    std = np.asarray(gaussian.std)
    trained = std > 0 if trained_steps is None else list(trained_steps)
    return std / std[trained].mean()
