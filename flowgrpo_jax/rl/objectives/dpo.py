"""Diffusion-DPO's objective: of a pair, the winner is to be matched better."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flowgrpo_jax.rl.objectives.clipping import Clip
from flowgrpo_jax.rl.objectives.noised import Noised, SampleElements, Score, Velocity
from flowgrpo_jax.rl.objectives.options import number
from flowgrpo_jax.rl.objectives.sigma_draws import SigmaInRange


@dataclass(frozen=True, kw_only=True)
class DpoOptions(SigmaInRange):
    """The scale of preferences, and two guards against winners that get less likely.

    After PG-DPO (arXiv 2511.19049; the exact forms are ours): `rejection_scaling` cuts
    the loser's gradient to the length of the winner's, and `preference_weight` times
    beta is the price of a winner's rise.
    """

    beta: float = number(100.0, above=True)
    rejection_scaling: bool = False
    preference_weight: float = number(0.0)


def dpo(
    noised: Noised,
    velocity: Velocity,
    fixed: Mapping[str, Velocity],
    elements: SampleElements,
    clip: Clip,
    options: DpoOptions,
) -> Score:
    """-log sigmoid(-beta / 2 * (rise of the winner - rise of the loser)), per pair.

    Diffusion-DPO (arXiv 2311.12908) on flow-matching errors, against the
    behaviour policy; a rise is error - old error, number 0 of a pair has won. Both of
    a pair carry the pair's loss, so that the mean is one over pairs.
    """
    error = noised.error(velocity)
    reference = noised.error(fixed["old"])
    won, lost = error[:, 0], error[:, 1]
    if options.rejection_scaling:
        # A gradient of an error is as long as the error's root.
        scale = jnp.minimum(1.0, jnp.sqrt(won / jnp.maximum(lost, 1e-12)))
        scale, constant = jax.lax.stop_gradient((scale, lost))
        lost = constant + scale * (lost - constant)
    rise = won - reference[:, 0]
    margin = rise - (lost - reference[:, 1])
    loss = jax.nn.softplus(options.beta / 2 * margin)
    loss = loss + options.preference_weight * options.beta * jax.nn.relu(rise)
    loss = jnp.broadcast_to(loss[:, None], noised.shape)
    return loss, {"policy_loss": loss, "flow_matching_loss": error}
