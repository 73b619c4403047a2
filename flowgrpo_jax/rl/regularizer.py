"""Regularizers: how far the learner has moved from its reference, for one sample.

All are means over latent dimensions, like log-probs, and treat the reference as a
constant. `penalties` puts those that have a weight together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.transition import Gaussian
from flowgrpo_jax.rl import likelihood, objective

KL_FORMS = ("official", "paper")
# Whom a penalty may compare with, and the fixed policy behind it.
REFERENCES = {"frozen": "frozen", "ema": "ema", "guided": "frozen"}


class Penalty(NamedTuple):
    """weight * measure(velocity, that of the reference, elements), one per point."""

    name: str
    reference: str  # of REFERENCES
    weight: Callable[..., Any]  # elements -> a number, or [slot, sibling]
    measure: Callable[..., Float32[Array, " point"]]


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
    if form not in KL_FORMS:
        raise UserError(f"kl_form: {form}: one of {', '.join(KL_FORMS)}")
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


def penalties(
    sampler: rollout.Sampler,
    *,
    beta: float,
    kl_form: str,
    kl_reference: str,
    kl_floor: float,
    adv_clip_max: float,
    ema_beta: float,
    norm_hinge: float,
) -> list[Penalty]:
    """Those that have a weight.

    kl_loss: beta * KL to `kl_reference` in `kl_form`; a sample of the worst advantage
    pays `kl_floor` of it, of the best all (CRD; 1 is a constant). ema_kl_loss: ema_beta
    * KL on velocities to the learner's average (AWM). norm_excess: norm_hinge * hinge
    over the length of the reference's velocity (NormGuard).
    """

    def kl_weight(elements):
        if kl_floor == 1.0:
            return beta
        good = objective.reward_probability(elements.advantage, adv_clip_max)
        return beta * (kl_floor + (1 - kl_floor) * good)

    def between_means(velocity, reference, elements):
        _, here = likelihood.replay(sampler, elements.transitions, velocity)
        _, there = likelihood.replay(sampler, elements.transitions, reference)
        per_slot = functools.partial(kl_on_means, kl_form)
        return jax.vmap(per_slot)(here.mean, there.mean, here)

    def per_point(measure):
        return lambda velocity, reference, _: jax.vmap(measure)(velocity, reference)

    on_velocities = per_point(kl_on_velocities)
    kl = on_velocities if kl_form == "velocity" else between_means
    excess = per_point(norm_excess)
    every = [
        (beta, Penalty("kl_loss", kl_reference, kl_weight, kl)),
        (ema_beta, Penalty("ema_kl_loss", "ema", lambda _: ema_beta, on_velocities)),
        (
            norm_hinge,
            Penalty("norm_excess", kl_reference, lambda _: norm_hinge, excess),
        ),
    ]
    return [penalty for weight, penalty in every if weight]


def _length(x) -> Float32[Array, ""]:
    # The floor keeps the root's gradient finite at 0.
    return jnp.sqrt(jnp.maximum(jnp.mean(x.astype(jnp.float32) ** 2), 1e-12))


def _mean_square(x, constant) -> Float32[Array, ""]:
    constant = jax.lax.stop_gradient(constant.astype(jnp.float32))
    return jnp.mean((x.astype(jnp.float32) - constant) ** 2)
