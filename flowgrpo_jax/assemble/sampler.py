"""From `sample` in a config to the samplers of training and evaluation."""

from collections.abc import Sequence

import jax.numpy as jnp
import ml_collections

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout, schedule, transition
from flowgrpo_jax.flow.plan import Plan
from flowgrpo_jax.models.flow_model import FlowModel


def make_sigmas(
    config: ml_collections.ConfigDict, model: FlowModel, num_steps: int
) -> tuple[float, ...]:
    """The sigmas of the config's schedule, as hashable floats."""
    shift = config.sample.shift
    match config.sample.schedule:
        case "linear":
            sigmas = schedule.linear(num_steps)
        case "shifted":
            sigmas = schedule.shifted(num_steps, shift or model.shift.value)
        case "by_tokens":
            sigmas = schedule.by_tokens(num_steps, model.image_tokens)
        case _:
            sigmas = model.sigmas(num_steps, shift)
    return tuple(float(sigma) for sigma in sigmas)


def make_sampler(
    config: ml_collections.ConfigDict, model: FlowModel, keep_velocity: bool = False
) -> rollout.Sampler:
    """The stochastic sampler of training."""
    sample = config.sample
    return rollout.Sampler(
        velocity=model.guided(sample.guidance_scale),
        sigmas=make_sigmas(config, model, sample.num_steps),
        kind=sample.sde_type,
        noise_level=tuple(sample.noise_levels) or sample.noise_level,
        correlation=(
            sample.noise_correlation if sample.init_noise == "correlated" else None
        ),
        keep_velocity=keep_velocity,
    )


def make_eval_sampler(
    config: ml_collections.ConfigDict, model: FlowModel, guidance_scale: float
) -> rollout.Sampler:
    """The deterministic sampler of evaluation: the ODE, more steps."""
    return rollout.Sampler(
        velocity=model.guided(guidance_scale),
        sigmas=make_sigmas(config, model, config.sample.eval_num_steps),
        kind="ode",
        noise_level=0.0,
    )


def check_actions(sampler: rollout.Sampler, plans: Sequence[Plan]) -> None:
    """UserError if a trained step adds no noise: it has no likelihood to learn from."""
    for made in plans:
        ends = {(made.nodes[n].at, made.nodes[acts[0]].at) for n, acts in made.states}
        for step, stop in sorted(ends):
            sigma, sigma_next, options = rollout.step_arguments(
                sampler, step, stop, 1.0
            )
            blank = jnp.zeros(1)
            drawn = transition.gaussian(
                sampler.kind, blank, blank, sigma, sigma_next, **options
            )
            if not drawn.std > 0:
                raise UserError(
                    f"sample.noise_level: the {sampler.kind} step {step} of "
                    f"{sampler.num_steps} is trained and has no noise: leave it out "
                    "(train.timestep_fraction, the window) or raise the level"
                )
