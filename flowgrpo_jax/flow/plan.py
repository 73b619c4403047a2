"""Plans: which transitions of a rollout are stochastic and which are trained.

A plan never says how a transition is made; that is `transition.py`. Plans are
hashable host data. Of a plan only `num_steps`, the number of trained steps and
`shared_noise` shape the compiled program; which steps they are goes in as numbers,
so a window that moves does not recompile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from flowgrpo_jax.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The rollout of one prompt's group.

    Steps are indices 0 (noisiest) .. num_steps - 1, in increasing order. `trained`
    is a part of `stochastic`; steps that are not stochastic are Euler steps. With
    `shared_noise` the whole group starts from one noise.
    """

    num_steps: int
    stochastic: tuple[int, ...]
    trained: tuple[int, ...]
    shared_noise: bool = False

    def __post_init__(self) -> None:
        steps = tuple(sorted(set(self.stochastic)))
        if steps != self.stochastic or not set(steps) <= set(range(self.num_steps)):
            raise UserError(
                f"plan.stochastic: {self.stochastic}: increasing steps of "
                f"0..{self.num_steps - 1}"
            )
        trained = tuple(sorted(set(self.trained)))
        if trained != self.trained or not trained or not set(trained) <= set(steps):
            raise UserError(
                f"plan.trained: {self.trained}: one or more increasing steps of "
                f"the stochastic ones {self.stochastic}"
            )


class Tables(NamedTuple):
    """The plans of one iteration as arrays, one row per prompt."""

    stochastic: Float32[np.ndarray, "prompt step"]  # 1 stochastic, 0 Euler
    trained: Int32[np.ndarray, "prompt trained"]  # step indices, increasing


def all_steps(num_steps: int, timestep_fraction: float = 0.99) -> Plan:
    """Flow-GRPO: every step stochastic, the first int(num_steps * fraction) trained.

    The default leaves out the last step, whose tiny std makes huge likelihoods.
    """
    num_trained = int(num_steps * timestep_fraction)
    if not 1 <= num_trained <= num_steps:
        raise UserError(
            f"timestep_fraction: {timestep_fraction}: it trains {num_trained} of "
            f"{num_steps} steps; at least 1 and at most all"
        )
    return Plan(num_steps, tuple(range(num_steps)), tuple(range(num_trained)))


def window(num_steps: int, start: int, size: int) -> Plan:
    """Stochastic and trained on steps [start, start + size), Euler elsewhere."""
    steps = tuple(range(start, start + size))
    return Plan(num_steps, steps, steps)


def random_window(
    num_steps: int,
    size: int,
    window_range: tuple[int, int],
    seed: int,
    iteration: int,
    prompt: int,
) -> Plan:
    """Flow-GRPO-Fast: a window placed uniformly inside `window_range` = [low, high).

    The start is uniform on low .. high - size, both included, and a pure function
    of (seed, iteration, prompt): no generator state to checkpoint.
    """
    low, high = window_range
    if not (1 <= size and 0 <= low <= high - size and high <= num_steps):
        raise UserError(
            f"sde_window_range: {tuple(window_range)}: must hold {size} (the "
            f"sde_window_size, at least 1) of the steps 0..{num_steps - 1}"
        )
    # The first word of the counter is what the generator itself advances.
    bits = np.random.Philox(key=seed, counter=[0, 0, prompt, iteration])
    start = np.random.Generator(bits).integers(low, high - size, endpoint=True)
    return window(num_steps, int(start), size)


def branch(num_steps: int, step: int) -> Plan:
    """G2RPO's singular sampling: siblings share everything up to one random step."""
    return Plan(num_steps, (step,), (step,), shared_noise=True)


def stack(plans: Sequence[Plan]) -> Tables:
    """One table from the plans of all prompts; UserError if their shapes differ."""
    shapes = {(p.num_steps, len(p.trained), p.shared_noise) for p in plans}
    if len(shapes) != 1:
        raise UserError(
            f"plans: {sorted(shapes)}: all plans of an iteration need the same "
            "(num_steps, number of trained steps, shared_noise)"
        )
    [(num_steps, _, _)] = shapes
    stochastic = np.zeros((len(plans), num_steps), np.float32)
    for row, plan in zip(stochastic, plans, strict=True):
        row[list(plan.stochastic)] = 1
    return Tables(stochastic, np.array([p.trained for p in plans], np.int32))
