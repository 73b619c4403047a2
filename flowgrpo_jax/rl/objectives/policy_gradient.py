"""The objective without a trust region: REINFORCE on stored transitions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip, clip_advantage, measure_ratio
from flowgrpo_jax.rl.objectives.noised import Score
from flowgrpo_jax.rl.objectives.options import NoOptions


def policy_gradient(
    actions: Actions,
    advantage: Float[Array, "slot sibling"],
    clip: Clip,
    options: NoOptions,
) -> Score:
    """-A * log(pi / pi_old), whose gradient is -A grad log pi at any ratio.

    REINFORCE, in the score-function form of DDPO (arXiv 2305.13301, DDPO_SF).
    """
    log_ratio = actions.log_ratio
    loss = -clip_advantage(advantage, clip.advantage) * log_ratio
    nowhere = jnp.zeros(loss.shape, bool)
    return loss, measure_ratio(log_ratio, nowhere, nowhere)
