"""Bytes that reach one device from the others in an iteration, by formula.

Counted as XLA's collectives move them if all devices work alike: of a whole that is
gathered from n devices (n - 1) / n come from others, as many of one that is summed into
shards, and twice as many of a sum that all have. `cost/hlo.py` counts the same from a
compiled program, and `estimate` prints both (docs/estimates.md compares them).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowgrpo_jax.engine.workload import PolicyWork, Work
from flowgrpo_jax.models.flow_model import overlay
from flowgrpo_jax.rl import summation
from flowgrpo_jax.runtime import mesh as meshes

FP32 = 4


class Rounds(NamedTuple):
    """How often a device runs the network on a microbatch in an iteration.

    Devices that share parameters run it together, so as often as the busiest of them.
    """

    sampling: int
    learning: int
    updates: int


class Traffic(NamedTuple):
    """Bytes of an iteration, by what travels.

    Over `fsdp`: `rollout`, the weights that are gathered to sample; `update`, forward,
    for fixed policies, and again for the backward pass; `gradients`, summed into shards
    after every microbatch. Over the whole mesh: `sums`, what is left of the gradients,
    at every optimizer step; `scores`, one number per image and reward, at most.
    """

    rollout: float
    update: float
    gradients: float
    sums: float
    scores: float

    @property
    def by_program(self) -> Mapping[str, Mapping[str, float]]:
        """Bytes of rollout and update over each axis of the mesh."""
        return {
            "rollout": {"fsdp": self.rollout},
            "update": {"fsdp": self.update + self.gradients, "data": self.sums},
        }


def of(work: Work, rounds: Rounds, images: int, remat: str) -> Traffic:
    """Of a run's workload that runs the network so often.

    With a `remat` that keeps the results of adaLN a LoRA's backward pass does not ask
    for its matrices again: there `update` is too much, by at most a sixth.
    """
    whole = overlay(work.frozen, work.trainable)["transformer"]
    specs = work.variables_specs["transformer"]
    gathered = _from_others(work, whole, specs, jnp.dtype(work.learner.dtype))
    # Without remat the whole weights are kept from the forward pass.
    passes = 1 + len(work.needs - {"old_velocity"}) + (remat != "none")
    learned = work.trainable
    grads = _from_others(work, learned, work.trainable_specs, jnp.dtype(jnp.float32))
    rewards = len(work.advantage.weights) if isinstance(work, PolicyWork) else 0
    return Traffic(
        rollout=rounds.sampling * gathered,
        update=rounds.learning * passes * gathered,
        gradients=rounds.learning * grads,
        sums=rounds.updates * _sums(work, learned),
        scores=float(FP32 * images * rewards),
    )


def _from_others(work: Work, tree: Any, specs: Any, dtype: Any) -> float:
    """Bytes of the wholes of what is split, less the device's own part."""

    def one(leaf, spec) -> float:
        count = _devices(work, spec)
        return dtype.itemsize * leaf.size * (count - 1) / count

    return sum(jax.tree.leaves(jax.tree.map(one, tree, specs)))


def _sums(work: Work, tree: Any) -> float:
    """Bytes of the sums over the axes that do not split a parameter."""

    def one(leaf, spec) -> float:
        own = _devices(work, spec)
        count = work.mesh.size // own
        return FP32 * rows * leaf.size / own * 2 * (count - 1) / count

    rows = summation.ROWS if work.learner.exact else 1
    return sum(jax.tree.leaves(jax.tree.map(one, tree, work.trainable_specs)))


def _devices(work: Work, spec: Any) -> int:
    count = 1
    for axis in meshes.AXES:
        if axis in spec:
            count *= work.mesh.shape[axis]
    return count
