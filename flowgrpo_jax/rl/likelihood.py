"""Likelihoods: what an objective learns about a stored action or a clean sample.

The log-prob of a stored transition under the learner's velocity comes from
`flow.rollout.replay`, the function that gave the old one. A clean sample has no
log-prob; what stands for it is how well the velocity at a noised copy matches.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.transition import Gaussian

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


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


def replay(
    sampler: rollout.Sampler,
    stored: rollout.Transitions,
    velocity: Float[Array, "slot height width channel"],
) -> tuple[Float32[Array, "slot sibling"], Gaussian]:
    """Log-probs of the stored actions and their Gaussian, under a velocity."""
    # Only stochastic steps are stored.
    always = jnp.ones(stored.step.shape, jnp.float32)
    return rollout.replay(
        sampler,
        stored.latent,
        stored.next_latent,
        velocity,
        stored.step,
        stored.stop,
        always,
    )


def replay_actions(
    sampler: rollout.Sampler,
    stored: rollout.Transitions,
    velocity: Float[Array, "slot height width channel"],
    with_old: bool,
) -> Actions:
    """The stored actions under the learner's velocity; `with_old` asks the old one."""
    log_prob, gaussian = replay(sampler, stored, velocity)
    old_gaussian = None
    if with_old:
        assert stored.velocity is not None
        _, old_gaussian = replay(sampler, stored, stored.velocity)
    sigmas = jnp.asarray(sampler.sigmas, jnp.float32)
    return Actions(
        log_prob,
        stored.log_prob,
        stored.next_latent,
        gaussian,
        old_gaussian,
        sigmas[stored.step] - sigmas[stored.stop],
    )


def guard_log_ratio(
    next_latent: Float[Array, "*latent"], new: Gaussian, old: Gaussian
) -> Float32[Array, ""]:
    """The ratio of GRPO-Guard (arXiv 2510.22319), as a logarithm, for one action.

    std * (log ratio + |new mean - old mean|^2 / (2 std^2)) without the cancellation:
    mean(noise of the action * (new mean - old mean)). Unlike the log ratio its mean
    over actions is 0. A deterministic step (std = 0) has ratio 1.
    """
    old_mean = jax.lax.stop_gradient(old.mean)
    away = jax.lax.stop_gradient(next_latent.astype(jnp.float32)) - old_mean
    stochastic = new.std > 0
    noise = away / jnp.where(stochastic, new.std, 1.0)
    return jnp.where(stochastic, jnp.mean(noise * (new.mean - old_mean)), 0.0)


def matching_log_prob(
    error: Float[Array, "*element"],
    sigma: Float[Array, "*element"],
    weighting: Weighting,
) -> Float32[Array, "*element"]:
    """-w(error, sigma): stands for the log-prob of a clean sample (AWM, 2509.25050).

    `error` is the flow-matching error, mean (v - (noise - data))^2, at that sigma.
    "huber" is its root, "ghuber" four times its fourth root, both shifted to 0 at 0.
    """
    tiny = 1e-10
    error = error.astype(jnp.float32)
    match weighting:
        case "uniform":
            weighted = error
        case "t":
            weighted = error * sigma
        case "t2":
            weighted = error * sigma**2
        case "huber":
            weighted = (jnp.sqrt(error + tiny) - tiny**0.5) * sigma
        case "ghuber":
            weighted = ((error + tiny) ** 0.25 - tiny**0.25) * sigma / 0.25
    return -weighted
