"""What one microbatch costs: an objective, its step weight and penalties composed.

A loss takes (variables, fixed policies, text, elements) of one microbatch and returns
losses and measurements [slot, sibling]; masking and averaging belong to the update.
It asks the policies for their velocities and hands these to the objective, a row of
`objectives.table`. On transitions the network runs once per slot: siblings that share
a state share its price.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.rl import likelihood
from flowgrpo_jax.rl.objectives import table
from flowgrpo_jax.rl.objectives.clipping import Clip
from flowgrpo_jax.rl.objectives.noised import Noised, Score, add_noise
from flowgrpo_jax.rl.regularizer import KL_FORMS, REFERENCES, penalties
from flowgrpo_jax.rl.step_weight import STEP_WEIGHTS, tempflow_weights

Loss = Callable[..., tuple[Float[Array, "slot sibling"], dict[str, Array]]]


@struct.dataclass
class TransitionElements:
    """Stored SDE steps with their advantage; leaves [slot, ...] inside a loss."""

    transitions: rollout.Transitions
    advantage: Float[Array, "*lead sibling"]


class Policies(NamedTuple):
    """Variables of the fixed policies; None where no loss needs them."""

    frozen: Any = None  # the base model
    old: Any = None  # the behaviour policy
    ema: Any = None  # the average of the learner


class Points(NamedTuple):
    """Where the networks are asked about stored transitions; a point is a slot."""

    latent: Float[Array, "point height width channel"]
    sigma: Float32[Array, " point"]
    text: tuple


def needs(
    objective: str,
    *,
    beta: float = 0.0,
    kl_reference: str = "frozen",
    ema_beta: float = 0.0,
    norm_hinge: float = 0.0,
) -> frozenset[str]:
    """All that the loss of `make` with these arguments needs, as `Objective.needs`."""
    names = set(table.row(objective).needs)
    if beta or norm_hinge:
        _check_choice("train.kl_reference", kl_reference, REFERENCES)
        names.add(REFERENCES[kl_reference])
    if ema_beta:
        names.add("ema")
    return frozenset(names)


def make(
    sampler: rollout.Sampler,
    objective: str,
    options: Mapping[str, Any],
    *,
    clip_range: float,
    adv_clip_max: float,
    beta: float,
    kl_form: str,
    clip_range_high: float | None = None,
    kl_reference: str = "frozen",
    kl_floor: float = 1.0,
    reference_sampler: rollout.Sampler | None = None,
    step_weight: str = "none",
    trained_steps: Sequence[int] | None = None,
    ema_beta: float = 0.0,
    norm_hinge: float = 0.0,
    draws: int = 1,
) -> Loss:
    """The loss of a row of OBJECTIVES plus its penalties; UserError for wrong values.

    `options` are those of the row, the other arguments those of `Clip`, `penalties`
    and, for `step_weight` "std", `tempflow_weights`. The reference "guided" is the
    frozen policy asked through `reference_sampler`. Clean samples are drawn `draws`
    times each.
    """
    row = table.row(objective)
    own_options = table.make_options(objective, options)
    high = clip_range if clip_range_high is None else clip_range_high
    clip = Clip(clip_range, high, adv_clip_max)
    _check_choice("train.step_weight", step_weight, STEP_WEIGHTS)
    _check_choice("train.kl_reference", kl_reference, REFERENCES)
    _check_choice("train.kl_form", kl_form, KL_FORMS)
    if row.consumes == "samples":
        _check_without_steps(objective, step_weight, kl_form if beta else "velocity")
    priced = penalties(
        sampler,
        beta=beta,
        kl_form=kl_form,
        kl_reference=kl_reference,
        kl_floor=kl_floor,
        adv_clip_max=adv_clip_max,
        ema_beta=ema_beta,
        norm_hinge=norm_hinge,
    )
    references = {penalty.reference for penalty in priced}
    if "guided" in references and reference_sampler is None:
        raise UserError("train.kl_reference: guided: needs a guided reference sampler")
    score = functools.partial(row.score, clip=clip, options=own_options)
    points_of: Callable[..., Points | Noised]
    if row.draw_sigma is None:
        weights = None
        if step_weight == "std":
            weights = jnp.asarray(tempflow_weights(sampler, trained_steps))
        points_of = functools.partial(_stored_points, sampler)
        score = functools.partial(_score_actions, sampler, row, score, weights)
    else:
        draw_sigma = functools.partial(
            row.draw_sigma, options=own_options, sigmas=sampler.sigmas, draws=draws
        )
        points_of = functools.partial(add_noise, draw_sigma, row.shared_draw)
    asked = sorted((row.needs - {"old_velocity"}) | references)

    def loss(variables, policies: Policies, text, elements):
        points = points_of(text, elements)

        def ask(sampler, variables):
            return sampler.velocity(
                variables, points.latent, points.sigma, *points.text
            )

        def ask_fixed(name):
            through = reference_sampler if name == "guided" else sampler
            policy = getattr(policies, REFERENCES.get(name, name))
            return jax.lax.stop_gradient(ask(through, policy))

        velocity = ask(sampler, variables)
        fixed = {name: ask_fixed(name) for name in asked}
        values, info = score(points, velocity, fixed, elements)
        for penalty in priced:
            price = penalty.measure(velocity, fixed[penalty.reference], elements)
            price = jnp.broadcast_to(price.reshape(len(values), -1), values.shape)
            info = info | {penalty.name: price}
            values = values + penalty.weight(elements) * price
        return values, info

    return loss


def _stored_points(sampler, text, elements: TransitionElements) -> Points:
    stored = elements.transitions
    sigma = jnp.asarray(sampler.sigmas, jnp.float32)[stored.step]
    return Points(stored.latent, sigma, text)


def _score_actions(
    sampler, row, score, weights, points, velocity, fixed, elements: TransitionElements
) -> Score:
    """Score the stored actions under the learner's velocity, weighed by their step."""
    stored = elements.transitions
    old = "old_velocity" in row.needs
    actions = likelihood.recompute_actions(sampler, stored, velocity, old)
    values, info = score(actions, elements.advantage)
    if weights is not None:
        values = weights[stored.step][:, None] * values
    gap = jnp.abs(actions.log_ratio)
    return values, info | {"policy_loss": values, "ratio_gap": gap}


def _check_choice(key: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value}: one of {', '.join(map(str, allowed))}")


def _check_without_steps(objective: str, step_weight: str, kl_form: str) -> None:
    """Clean samples have no steps to weigh, nor means to compare."""
    if step_weight != "none":
        raise UserError(f"train.step_weight: {step_weight}: {objective} has no steps")
    if kl_form != "velocity":
        raise UserError(f"train.kl_form: {kl_form}: for {objective} only velocity")
