"""The table of objectives: what each learns from, what it needs, its options."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl.objectives import options as option_fields
from flowgrpo_jax.rl.objectives.awm import AwmOptions, awm
from flowgrpo_jax.rl.objectives.crd import CrdOptions, crd
from flowgrpo_jax.rl.objectives.dgpo import DgpoOptions, dgpo
from flowgrpo_jax.rl.objectives.dpo import DpoOptions, dpo
from flowgrpo_jax.rl.objectives.dppo import DppoOptions, dppo
from flowgrpo_jax.rl.objectives.flow_matching import FlowMatchingOptions, flow_matching
from flowgrpo_jax.rl.objectives.guard import GuardOptions, guard
from flowgrpo_jax.rl.objectives.nft import NftOptions, nft
from flowgrpo_jax.rl.objectives.noised import Score
from flowgrpo_jax.rl.objectives.options import NoOptions
from flowgrpo_jax.rl.objectives.policy_gradient import policy_gradient
from flowgrpo_jax.rl.objectives.ppo_clip import ppo_clip
from flowgrpo_jax.rl.objectives.sigma_draws import pretraining_sigma, sigma_in_range
from flowgrpo_jax.rl.objectives.weighted_matching import (
    WeightedMatchingOptions,
    weighted_matching,
)

Grouping = Literal["one", "pair", "group"]


@dataclass(frozen=True)
class Objective:
    """A row: what it learns from and what has to be at hand.

    `score` takes (actions, advantage, clip, options) of transitions, or (noised,
    velocity, fixed velocities by name, elements, clip, options) of samples.
    `grouping`: who are siblings in a slot. `needs`: "old_velocity" is that stored with
    transitions, the others are fields of `losses.Policies`. Samples are noised at the
    sigma of `draw_sigma`(draw, options, sigmas, draws); with `shared_draw` siblings
    alike.
    """

    consumes: Literal["transitions", "samples"]
    score: Callable[..., Score]
    options: type
    needs: frozenset[str] = frozenset()
    grouping: Grouping = "one"
    draw_sigma: Callable[..., Array] | None = None
    shared_draw: bool = False


def _on_transitions(score, *needs: str, options: type = NoOptions) -> Objective:
    return Objective("transitions", score, options, frozenset(needs))


def _on_samples(
    score,
    *needs: str,
    options: type,
    grouping: Grouping = "one",
    draw_sigma: Callable[..., Array] = sigma_in_range,
    shared_draw: bool = False,
) -> Objective:
    return Objective(
        "samples",
        score,
        options,
        frozenset(needs),
        grouping,
        draw_sigma,
        shared_draw,
    )


# The objective of pretraining: its samples are captioned scenes, not rewarded images.
PRETRAINING = "flow_matching"
OBJECTIVES: dict[str, Objective] = {
    "ppo_clip": _on_transitions(ppo_clip),
    "guard": _on_transitions(guard, "old_velocity", options=GuardOptions),
    "dppo": _on_transitions(dppo, "old_velocity", options=DppoOptions),
    "policy_gradient": _on_transitions(policy_gradient),
    "nft": _on_samples(nft, "old", options=NftOptions),
    "awm": _on_samples(awm, "old", options=AwmOptions),
    "dgpo": _on_samples(
        dgpo, "frozen", "old", options=DgpoOptions, grouping="group", shared_draw=True
    ),
    "crd": _on_samples(crd, "old", options=CrdOptions, grouping="group"),
    "dpo": _on_samples(
        dpo, "old", options=DpoOptions, grouping="pair", shared_draw=True
    ),
    "weighted_matching": _on_samples(
        weighted_matching, options=WeightedMatchingOptions
    ),
    PRETRAINING: _on_samples(
        flow_matching, options=FlowMatchingOptions, draw_sigma=pretraining_sigma
    ),
}


def row(objective: str) -> Objective:
    """A row of the table; UserError for a name that it does not have."""
    if objective not in OBJECTIVES:
        raise UserError(f"train.objective: {objective}: one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


def make_options(objective: str, values: Mapping[str, Any]) -> Any:
    """The options of a row; UserError for one that is not its own, wrong or missing."""
    options = row(objective).options
    option_fields.check_names(objective, options, values)
    for field in dataclasses.fields(options):
        key = f"train.objective_options.{field.name}"
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{key}: {objective} needs it")
            continue
        words = option_fields.choices(field)
        if words and values[field.name] not in words:
            raise UserError(f"{key}: {values[field.name]}: one of {', '.join(words)}")
    return options(**values)
