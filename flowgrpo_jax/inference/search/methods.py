"""The searches by name: how each spends a budget of evaluations."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference.search import noise_optimization, rollover, selection
from flowgrpo_jax.inference.search.setting import Result, Reward, Setting

METHODS = ("best_of_n", "cfg_rejection", "rbf", "rbf_vp", "noise_optimization")


class Guidance(NamedTuple):
    """What cfg_rejection must know of the sampler's guidance, and its choices."""

    velocity: Callable[..., Array]  # without guidance
    scale: float
    judged_steps: int = 10
    share: float = 0.25


def search(
    method: str,
    setting: Setting,
    budget: int,
    reward: Reward | None,
    guidance: Guidance,
    smooth: noise_optimization.SmoothReward | None = None,
) -> Result:
    """One prompt's search with at most `budget` evaluations.

    cfg_rejection takes no reward, noise_optimization the `smooth` one, all others
    `reward`. UserError for a budget that is too small for one image.
    """
    steps = setting.num_steps
    if budget < steps:
        raise UserError(
            f"budget: {budget}: must be at least {steps}, the evaluations of one image"
        )
    if method == "cfg_rejection":
        judged, share = guidance.judged_steps, guidance.share
        return selection.cfg_rejection(
            setting,
            guidance.velocity,
            guidance.scale,
            candidates(budget, steps, judged, share),
            judged,
            share,
        )
    if method == "noise_optimization":
        assert smooth is not None
        return noise_optimization.noise_optimization(setting, smooth, budget // steps)
    assert reward is not None
    if method == "best_of_n":
        return selection.best_of_n(setting, reward, budget // steps)
    path = {"rbf": "linear", "rbf_vp": "vp"}[method]
    return rollover.rollover_budget_forcing(setting, reward, budget, path)


def candidates(budget: int, num_steps: int, judged_steps: int, share: float) -> int:
    """The most candidates of cfg_rejection that a budget pays for."""

    def price(number: int) -> int:
        kept = selection.number_kept(number, share)
        return number * judged_steps + kept * (num_steps - judged_steps)

    number = 1
    while judged_steps > 0 and price(number + 1) <= budget:
        number += 1
    return number
