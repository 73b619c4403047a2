"""Likelihoods: what an objective is told about stored actions.

The log-prob of a stored transition under the learner's velocity comes from
`flow.rollout.log_probs`, the function that gave the old one. (A clean sample has no
log-prob: what stands for it is in `objectives.awm`.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.transition import Gaussian


class Actions(NamedTuple):
    """What is known about the stored actions when the learner is asked again."""

    log_prob: Float32[Array, "slot sibling"]
    old_log_prob: Float32[Array, "slot sibling"]
    next_latent: Float[Array, "slot sibling height width channel"]
    gaussian: Gaussian
    old_gaussian: Gaussian | None  # where the objective needs the old velocity
    dt: Float32[Array, " slot"]  # length of the step, > 0

    @property
    def log_ratio(self) -> Float32[Array, "slot sibling"]:
        return log_ratio(self.log_prob, self.old_log_prob)


def log_ratio(
    log_prob: Float[Array, "*element"], old_log_prob: Float[Array, "*element"]
) -> Float32[Array, "*element"]:
    """log(pi / pi_old), per latent dimension as log-probs are; 0 on-policy."""
    old_log_prob = jax.lax.stop_gradient(old_log_prob)
    return log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)


def recompute(
    sampler: rollout.Sampler,
    stored: rollout.Transitions,
    velocity: Float[Array, "slot height width channel"],
) -> tuple[Float32[Array, "slot sibling"], Gaussian]:
    """Log-probs of the stored actions and their Gaussian, under a velocity."""
    # Only stochastic steps are stored.
    always = jnp.ones(stored.step.shape, jnp.float32)
    return rollout.log_probs(
        sampler,
        stored.latent,
        stored.next_latent,
        velocity,
        stored.step,
        stored.stop,
        always,
    )


def recompute_actions(
    sampler: rollout.Sampler,
    stored: rollout.Transitions,
    velocity: Float[Array, "slot height width channel"],
    with_old: bool,
) -> Actions:
    """The stored actions under the learner's velocity; `with_old` asks the old one."""
    log_prob, gaussian = recompute(sampler, stored, velocity)
    old_gaussian = None
    if with_old:
        assert stored.velocity is not None
        _, old_gaussian = recompute(sampler, stored, stored.velocity)
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    return Actions(
        log_prob,
        stored.log_prob,
        stored.next_latent,
        gaussian,
        old_gaussian,
        sigmas[stored.step] - sigmas[stored.stop],
    )
