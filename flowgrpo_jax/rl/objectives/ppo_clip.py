"""Flow-GRPO's objective: PPO's clipped ratios on stored transitions."""

from jaxtyping import Array, Float

from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objectives.clipping import Clip, clipped_surrogate
from flowgrpo_jax.rl.objectives.noised import Score
from flowgrpo_jax.rl.objectives.options import NoOptions


def ppo_clip(
    actions: Actions,
    advantage: Float[Array, "slot sibling"],
    clip: Clip,
    options: NoOptions,
) -> Score:
    """max(-A * rho, -A * clip(rho, 1 - low, 1 + high)), rho = pi / pi_old.

    Flow-GRPO (arXiv 2505.05470), which is PPO (arXiv 1707.06347) on the
    Gaussian steps of the flow's SDE. log rho is a mean over latent dimensions.
    """
    return clipped_surrogate(actions.log_ratio, advantage, clip)
