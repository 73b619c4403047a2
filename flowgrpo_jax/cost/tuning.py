"""Which microbatch, remat, fsdp and reward batches fit chips and cost least, by formula.

What a choice costs is what it carries out, idle slots and all that `remat` computes
again included: each program takes the longer of computing and of what travels, and
waits for what nothing hides: weights that few rows are multiplied with, what is kept for
the backward pass, the first weights of every block. Kernels reach no full rate, so it is
a measure to compare choices by, not a forecast.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from flowgrpo_jax.cost import budget, flops
from flowgrpo_jax.cost.budget import Budget
from flowgrpo_jax.cost.links import Way
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.models.remat import POLICIES

# Microbatches beside the divisors of a group, which leave no slot idle.
_POWERS = (1, 2, 4, 8, 16, 32, 64)
_MOST = 64
# Of the weights, those of adaLN: their products have a row an image, and hide nothing.
_FEW_ROWS = 1 / 3
# Of the gathered bytes, those that a block waits for before its first product: 16 to 22%
# in what libtpu 0.0.42.1 schedules (docs/estimates.md).
_FIRST = 1 / 6


class Choice(NamedTuple):
    """What the search may set; names are those of the config's keys."""

    microbatch: int
    remat: str
    fsdp: int
    reward_batches: int

    @property
    def flags(self) -> str:
        """As words of a command line."""
        return (
            f"--config.microbatch={self.microbatch} --config.remat={self.remat} "
            f"--config.mesh.data=-1 --config.mesh.fsdp={self.fsdp} "
            f"--config.reward_batches={self.reward_batches}"
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice, its budget, and seconds of an iteration as the module's text says."""

    choice: Choice
    costs: Budget
    seconds: float

    @property
    def bytes(self) -> float:
        """Of a device, by the formulas."""
        return float(sum(self.costs.bytes.values()))


def search(
    work_of: Callable[[int, int], PolicyWork | None],
    devices: int,
    group_size: int,
    images: int,
    chip: flops.Chip,
    paths_of: Callable[[PolicyWork], Mapping[str, Way]],
) -> list[Candidate]:
    """All candidates that fit by the formulas, the cheapest first.

    `work_of(microbatch, fsdp)` is the run with these and one reward batch, or None.
    `images`: of an iteration; a microbatch is at most a device's share of them.
    """
    found = []
    for fsdp in _divisors(devices):
        for microbatch in microbatches(group_size, -(-images // devices)):
            work = work_of(microbatch, fsdp)
            if work is None:
                continue
            fitting = [
                one
                for one in _of(work, chip, paths_of(work))
                if one.bytes <= chip.memory
            ]
            if not fitting:  # a larger microbatch takes more
                break
            found += fitting
    return sorted(found, key=lambda one: (one.seconds, one.bytes))


def microbatches(group_size: int, most: int) -> list[int]:
    """Those that are tried, in rising order."""
    tried = {*_POWERS, *_divisors(group_size)}
    return sorted(n for n in tried if n <= min(most, _MOST))


def carried_out(
    work: PolicyWork, costs: Budget, chip: flops.Chip, paths: Mapping[str, Way]
) -> Candidate:
    """The work as it is; `costs` are its own."""
    choice = Choice(
        work.learner.microbatch,
        work.model.denoiser.remat,
        work.mesh.shape["fsdp"],
        work.planner.spec.reward_batches,
    )
    return Candidate(choice, costs, _seconds(work, costs, chip, paths))


def _of(
    work: PolicyWork, chip: flops.Chip, paths: Mapping[str, Way]
) -> Iterator[Candidate]:
    made = carried_out(work, budget.of(work), chip, paths)
    parts = reward_batches(work)
    for remat in POLICIES:
        costs = budget.with_remat(work, made.costs, remat)
        choice = made.choice._replace(remat=remat, reward_batches=parts)
        yield Candidate(choice, costs, _seconds(work, costs, chip, paths))


def reward_batches(work: PolicyWork) -> int:
    """As many parts of a rollout as leave no slot of the decoder idle.

    The host scores the last part after the devices have ended: the smaller it is, the
    shorter they wait.
    """
    _, packed, _ = work.first_iteration()
    packs = len(packed.tables.rounds) // work.mesh.size
    images, each = packed.tables.leaf.start.shape[1], work.learner.microbatch

    def decoded(parts: int) -> int:  # microbatches
        return parts * -(-(packs // parts) * images // each)

    return max(n for n in _divisors(packs) if decoded(n) == decoded(1))


def _seconds(
    work: PolicyWork, costs: Budget, chip: flops.Chip, paths: Mapping[str, Way]
) -> float:
    each, rounds, microbatch = costs.operations, costs.rounds, work.learner.microbatch
    images = -(-costs.passes.images // costs.devices)
    idle_lanes = flops.head_factor(costs.forward, chip, work.model.denoiser.head_dim)
    sampled = rounds.sampling * microbatch * each.sampling * idle_lanes
    learned = rounds.learning * microbatch * (each.learning + each.rerun) * idle_lanes
    computing = {"rollout": sampled + images * each.decoding, "update": learned}
    # Weights are read by every pass forward and backward, and to be computed again.
    passes = 2 + len(work.needs - {"old_velocity"}) + (not work.learner.partly)
    reads = rounds.sampling + rounds.learning * (passes + bool(each.rerun))
    weights = jnp.dtype(work.learner.dtype).itemsize * costs.parameters
    memory = reads * weights * _FEW_ROWS
    memory += 2 * rounds.learning * costs.bytes["activations"]
    memory += costs.traffic.rollout + costs.traffic.update  # what arrives is written
    links = costs.travelling(paths)
    waiting = memory / chip.bandwidth + _FIRST * sum(links.values())
    return waiting + sum(
        max(flops.seconds(count, chip), links[name])
        for name, count in computing.items()
    )


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
