"""What one microbatch costs: a likelihood, an objective and a regularizer composed.

A loss takes (variables, reference variables, text, elements) of one microbatch and
returns losses and measurements [slot, sibling]; masking and averaging belong to the
update. The network runs once per slot: siblings that share a state share its price.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.schedule import shift_sigma
from flowgrpo_jax.rl import likelihood, objective, regularizer

Loss = Callable[..., tuple[Float[Array, "slot sibling"], dict[str, Array]]]


@struct.dataclass
class TransitionElements:
    """Stored SDE steps with their advantage; leaves [slot, ...] inside a loss."""

    transitions: rollout.Transitions
    advantage: Float[Array, "*lead sibling"]


@struct.dataclass
class SampleElements:
    """Clean latents for forward-process objectives."""

    clean: Float[Array, "*lead height width channel"]
    noise_key: Array


def clipped_policy_loss(
    sampler: rollout.Sampler,
    *,
    clip_range: float,
    adv_clip_max: float,
    beta: float,
    kl_form: str,
) -> Loss:
    """Flow-GRPO (arXiv 2505.05470): clipped ratios plus beta * KL."""

    def loss(variables, reference, text, elements: TransitionElements):
        stored = elements.transitions
        sigma = jnp.asarray(sampler.sigmas, jnp.float32)[stored.step]
        velocity = sampler.velocity(variables, stored.latent, sigma, *text)
        # Only stochastic steps are stored.
        always = jnp.ones(stored.step.shape, jnp.float32)
        log_prob, gaussian = rollout.replay(
            sampler, stored.latent, stored.next_latent, velocity, stored.step, always
        )
        policy, info = objective.ppo_clip(
            log_prob,
            stored.log_prob,
            elements.advantage,
            clip_range,
            clip_range,
            adv_clip_max,
        )
        gap = jnp.abs(likelihood.log_ratio(log_prob, stored.log_prob))
        info = info | {"policy_loss": policy, "ratio_gap": gap}
        if beta == 0.0:
            return policy, info
        fixed = jax.lax.stop_gradient(
            sampler.velocity(reference, stored.latent, sigma, *text)
        )
        if kl_form == "velocity":
            kl = jax.vmap(regularizer.kl_on_velocities)(velocity, fixed)
        else:
            _, there = rollout.replay(
                sampler, stored.latent, stored.next_latent, fixed, stored.step, always
            )
            kl = jax.vmap(
                lambda mean, other, g: regularizer.kl_on_means(kl_form, mean, other, g)
            )(gaussian.mean, there.mean, gaussian)
        kl = jnp.broadcast_to(kl[:, None], policy.shape)
        return policy + beta * kl, info | {"kl_loss": kl}

    return loss


def flow_matching_loss(
    velocity: Callable, *, shift: float, uniform_share: float = 0.1
) -> Loss:
    """Rectified-flow regression on clean latents, as base models are pretrained.

    Sigma is logit-normal (Esser et al. 2024), shifted to higher noise like the
    sampling schedule, with a share of uniform draws so that no sigma is left out.
    """

    def loss(variables, reference, text, elements: SampleElements):
        del reference
        clean = elements.clean

        def draw(key):
            keys = jax.random.split(key, 4)
            sigma = jax.nn.sigmoid(jax.random.normal(keys[0]))
            sigma = shift_sigma(sigma, shift)
            flat = jax.random.uniform(keys[1])
            sigma = jnp.where(jax.random.uniform(keys[2]) < uniform_share, flat, sigma)
            return sigma, jax.random.normal(keys[3], clean.shape[1:])

        sigma, noise = jax.vmap(draw)(elements.noise_key)
        level = sigma[:, None, None, None]
        noisy = (1 - level) * clean + level * noise
        error = objective.flow_matching(
            velocity(variables, noisy, sigma, *text), clean, noise
        )[:, None]
        return error, {"flow_matching_loss": error}

    return loss
