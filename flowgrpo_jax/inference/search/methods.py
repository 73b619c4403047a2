"""The searches by name: how each spends a budget of evaluations."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference.search import noise_optimization, rollover, selection
from flowgrpo_jax.inference.search.setting import Result, Reward, Setting


class Guidance(NamedTuple):
    """What cfg_rejection must know of the sampler's guidance, and its choices."""

    velocity: Callable[..., Array]  # without guidance
    scale: float
    judged_steps: int = 10
    share: float = 0.25


class Means(NamedTuple):
    """What a search may choose by; the one that it needs must be there."""

    reward: Reward | None
    guidance: Guidance
    smooth: noise_optimization.SmoothReward | None


class Method(NamedTuple):
    """A row: what the search does, what it chooses by, and how few steps it can do with.

    `function` takes the setting, the budget and the means.
    """

    summary: str
    by: Literal["reward", "guidance", "gradient"]
    function: Callable[[Setting, int, Means], Result]
    fewest_steps: int = 1


def _best_of_n(setting: Setting, budget: int, means: Means) -> Result:
    assert means.reward is not None
    return selection.best_of_n(setting, means.reward, budget // setting.num_steps)


def _cfg_rejection(setting: Setting, budget: int, means: Means) -> Result:
    judged, share = means.guidance.judged_steps, means.guidance.share
    return selection.cfg_rejection(
        setting,
        means.guidance.velocity,
        means.guidance.scale,
        candidates(budget, setting.num_steps, judged, share),
        judged,
        share,
    )


def _rollover(path: str, setting: Setting, budget: int, means: Means) -> Result:
    assert means.reward is not None
    return rollover.rollover_budget_forcing(setting, means.reward, budget, path)


def _noise_optimization(setting: Setting, budget: int, means: Means) -> Result:
    assert means.smooth is not None
    return noise_optimization.noise_optimization(
        setting, means.smooth, budget // setting.num_steps
    )


METHODS: dict[str, Method] = {
    "best_of_n": Method("keeps the best of many by the reward", "reward", _best_of_n),
    "cfg_rejection": Method(
        "finishes only what guidance moves most at the start; no reward",
        "guidance",
        _cfg_rejection,
    ),
    "rbf": Method(
        "rollover budget forcing: the best of several at every step",
        "reward",
        functools.partial(_rollover, "linear"),
        fewest_steps=2,
    ),
    "rbf_vp": Method(
        "the same on a variance-preserving path",
        "reward",
        functools.partial(_rollover, "vp"),
        fewest_steps=2,
    ),
    "noise_optimization": Method(
        "ascends a differentiable reward by the gradient of the noise",
        "gradient",
        _noise_optimization,
    ),
}


def search(
    method: str,
    setting: Setting,
    budget: int,
    reward: Reward | None,
    guidance: Guidance,
    smooth: noise_optimization.SmoothReward | None = None,
) -> Result:
    """One prompt's search with at most `budget` evaluations.

    `Method.by` tells which of `reward`, `guidance` and `smooth` it needs. UserError
    for a budget that is too small for one image.
    """
    steps = setting.num_steps
    if budget < steps:
        raise UserError(
            f"budget: {budget}: must be at least {steps}, the evaluations of one image"
        )
    return METHODS[method].function(setting, budget, Means(reward, guidance, smooth))


def candidates(budget: int, num_steps: int, judged_steps: int, share: float) -> int:
    """The most candidates of cfg_rejection that a budget pays for."""

    def price(number: int) -> int:
        kept = selection.number_kept(number, share)
        return number * judged_steps + kept * (num_steps - judged_steps)

    number = 1
    while judged_steps > 0 and price(number + 1) <= budget:
        number += 1
    return number
