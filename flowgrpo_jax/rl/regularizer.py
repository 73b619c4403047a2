"""Regularizers: what the learner pays for its distance from a reference.

A penalty is a weight times a measure of `divergence`; `penalties` gives those that
have a weight.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float32

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.rl import likelihood
from flowgrpo_jax.rl.divergence import (
    FORMS_ON_MEANS,
    kl_on_means,
    kl_on_velocities,
    norm_excess,
)
from flowgrpo_jax.rl.objectives.clipping import reward_probability

KL_FORMS = (*FORMS_ON_MEANS, "velocity")
# Whom a penalty may compare with, and the fixed policy behind it.
REFERENCES = {"frozen": "frozen", "ema": "ema", "guided": "frozen"}


class Penalty(NamedTuple):
    """weight * measure(velocity, that of the reference, elements), one per point."""

    name: str
    reference: str  # of REFERENCES
    weight: Callable[..., Any]  # elements -> a number, or [slot, sibling]
    measure: Callable[..., Float32[Array, " point"]]


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
        good = reward_probability(elements.advantage, adv_clip_max)
        return beta * (kl_floor + (1 - kl_floor) * good)

    def between_means(velocity, reference, elements):
        _, here = likelihood.recompute(sampler, elements.transitions, velocity)
        _, there = likelihood.recompute(sampler, elements.transitions, reference)
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
