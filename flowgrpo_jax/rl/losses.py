"""What one microbatch costs: an objective, its step weight and regularizers composed.

A loss takes (variables, fixed policies, text, elements) of one microbatch and returns
losses and measurements [slot, sibling]; masking and averaging belong to the update.
On transitions the network runs once per slot: siblings that share a state share its
price. `make` is the only entry; an objective is a row of OBJECTIVES.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.rl import forward_losses, likelihood, objective, regularizer
from flowgrpo_jax.rl.forward_losses import Clip, SampleElements, Score
from flowgrpo_jax.rl.likelihood import Actions
from flowgrpo_jax.rl.objective import tempflow_weights
from flowgrpo_jax.rl.regularizer import REFERENCES

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Policies",
    "SampleElements",
    "TransitionElements",
    "make",
    "needs",
    "tempflow_weights",
]

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


def ppo_clip(actions: Actions, advantage, *, clip: Clip) -> Score:
    """Flow-GRPO (arXiv 2505.05470): clipped ratios."""
    return objective.ppo_clip(actions.log_prob, actions.old_log_prob, advantage, *clip)


def guard(
    actions: Actions, advantage, *, clip: Clip, divide_by_dt: bool = True
) -> Score:
    """GRPO-Guard (arXiv 2510.22319): ratios without bias, clipped; loss over dt.

    With `divide_by_dt` all steps pull equally hard; its clip ranges are about 2e-6.
    """
    assert actions.old_gaussian is not None
    per_action = jax.vmap(likelihood.guard_log_ratio, (0, None, None))
    log_ratio = jax.vmap(per_action)(
        actions.next_latent, actions.gaussian, actions.old_gaussian
    )
    loss, info = objective.clipped_surrogate(log_ratio, advantage, *clip)
    return loss / actions.dt[:, None] if divide_by_dt else loss, info


def dppo(actions: Actions, advantage, *, clip: Clip, threshold: float = 1e-5) -> Score:
    """Flow-DPPO (arXiv 2606.11025): no step further where the KL says far enough."""
    assert actions.old_gaussian is not None
    divergence = jax.vmap(functools.partial(regularizer.kl_on_means, "paper"))(
        actions.gaussian.mean, actions.old_gaussian.mean, actions.gaussian
    )
    return objective.dppo(
        actions.log_ratio, divergence[:, None], advantage, threshold, clip.advantage
    )


def policy_gradient(actions: Actions, advantage, *, clip: Clip) -> Score:
    """REINFORCE (DDPO's score-function form, arXiv 2305.13301): no trust region."""
    return objective.policy_gradient(actions.log_ratio, advantage, clip.advantage)


@dataclass(frozen=True)
class Objective:
    """A row: what it learns from and what has to be at hand.

    `together`: what must be in one slot as siblings. `needs`: "old_velocity" is that
    stored with transitions, the others are fields of Policies. `shared_draw`: siblings
    are noised alike. Options are the keyword-only arguments of `score` and `sigma`.
    """

    consumes: Literal["transitions", "samples"]
    together: Literal["one", "pair", "group"]
    needs: frozenset[str]
    score: Callable[..., tuple[Array, dict[str, Array]]]
    sigma: Callable[..., Array] | None = None
    shared_draw: bool = False


def _on_transitions(score, *needs: str) -> Objective:
    return Objective("transitions", "one", frozenset(needs), score)


def _on_samples(
    score,
    *needs: str,
    together: Literal["one", "pair", "group"] = "one",
    sigma=forward_losses.sigma_in_range,
    shared_draw: bool = False,
) -> Objective:
    return Objective("samples", together, frozenset(needs), score, sigma, shared_draw)


OBJECTIVES: dict[str, Objective] = {
    "ppo_clip": _on_transitions(ppo_clip),
    "guard": _on_transitions(guard, "old_velocity"),
    "dppo": _on_transitions(dppo, "old_velocity"),
    "policy_gradient": _on_transitions(policy_gradient),
    "nft": _on_samples(forward_losses.nft, "old"),
    "awm": _on_samples(forward_losses.awm, "old"),
    "dgpo": _on_samples(
        forward_losses.dgpo, "frozen", together="group", shared_draw=True
    ),
    "crd": _on_samples(forward_losses.crd, "old", together="group"),
    "dpo": _on_samples(forward_losses.dpo, "old", together="pair", shared_draw=True),
    "weighted_matching": _on_samples(forward_losses.weighted_matching),
    "flow_matching": _on_samples(
        forward_losses.flow_matching, sigma=forward_losses.pretraining_sigma
    ),
}


class Points(NamedTuple):
    """Where the networks are asked; a point is a slot, or a sample of `Noised`."""

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
    """All that the loss of `make` with these arguments needs, as Objective.needs."""
    names = set(_row(objective).needs)
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
) -> Loss:
    """The loss of a row of OBJECTIVES plus its penalties; UserError for wrong values.

    `options` are those of the row, the other arguments those of `Clip`,
    `regularizer.penalties` and, for `step_weight` "std", of `tempflow_weights`. The
    reference "guided" is the frozen policy asked through `reference_sampler`.
    """
    row = _row(objective)
    score_options, sigma_options = _sort_options(objective, row, options)
    high = clip_range if clip_range_high is None else clip_range_high
    clip = Clip(clip_range, high, adv_clip_max)
    _check_choice("train.step_weight", step_weight, ("none", "std"))
    _check_choice("train.kl_reference", kl_reference, REFERENCES)
    _check_choice("train.kl_form", kl_form, (*regularizer.KL_FORMS, "velocity"))
    if row.consumes == "samples":
        _check_without_steps(objective, step_weight, kl_form if beta else "velocity")
    penalties = regularizer.penalties(
        sampler,
        beta=beta,
        kl_form=kl_form,
        kl_reference=kl_reference,
        kl_floor=kl_floor,
        adv_clip_max=adv_clip_max,
        ema_beta=ema_beta,
        norm_hinge=norm_hinge,
    )
    references = {penalty.reference for penalty in penalties}
    if "guided" in references and reference_sampler is None:
        raise UserError("train.kl_reference: guided: needs a guided reference sampler")
    score = functools.partial(row.score, clip=clip, **score_options)
    place: Callable[..., Points | forward_losses.Noised]
    if row.sigma is None:
        weights = None
        if step_weight == "std":
            weights = jnp.asarray(tempflow_weights(sampler, trained_steps))
        place = functools.partial(_stored_points, sampler)
        score = functools.partial(_score_actions, sampler, row, score, weights)
    else:
        sigma = functools.partial(row.sigma, **sigma_options)
        place = functools.partial(forward_losses.add_noise, sigma, row.shared_draw)
    asked = sorted((row.needs - {"old_velocity"}) | references)

    def loss(variables, policies: Policies, text, elements):
        points = place(text, elements)

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
        for penalty in penalties:
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
    """Replay the stored actions under the learner's velocity and score them."""
    stored = elements.transitions
    old = "old_velocity" in row.needs
    actions = likelihood.replay_actions(sampler, stored, velocity, old)
    values, info = score(actions, elements.advantage)
    if weights is not None:
        values = weights[stored.step][:, None] * values
    gap = jnp.abs(actions.log_ratio)
    return values, info | {"policy_loss": values, "ratio_gap": gap}


def _row(objective: str) -> Objective:
    _check_choice("train.objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


def _check_choice(key: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value}: one of {', '.join(map(str, allowed))}")


def _check_without_steps(objective: str, step_weight: str, kl_form: str) -> None:
    """Clean samples have no steps to weigh, nor means to compare."""
    if step_weight != "none":
        raise UserError(f"train.step_weight: {step_weight}: {objective} has no steps")
    if kl_form != "velocity":
        raise UserError(f"train.kl_form: {kl_form}: for {objective} only velocity")


def options(objective: str) -> dict[str, inspect.Parameter]:
    """The options of a row of OBJECTIVES, with their types and defaults."""
    row = _row(objective)
    return _parameters(row.score) | _parameters(row.sigma)


def _sort_options(
    objective: str, row: Objective, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the score and those of the draw of sigma; UserError if not of them."""
    of_score, of_sigma = _parameters(row.score), _parameters(row.sigma)
    allowed = of_score | of_sigma
    for name, value in options.items():
        key = f"train.objective_options.{name}"
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UserError(f"{key}: no option of {objective}; its options: {known}")
        choices = typing.get_args(allowed[name].annotation)
        if typing.get_origin(allowed[name].annotation) is Literal:
            _check_choice(key, value, choices)
    for name, parameter in allowed.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"train.objective_options.{name}: {objective} needs it")
    return (
        {name: value for name, value in options.items() if name in of_score},
        {name: value for name, value in options.items() if name in of_sigma},
    )


def _parameters(function: Callable | None) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters; `clip` is no option."""
    if function is None:
        return {}
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "clip"
    }
