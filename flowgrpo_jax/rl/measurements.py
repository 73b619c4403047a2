"""How what a loss measures becomes one number of an iteration.

Most are means by weight: over the entries of an update, then over the updates that had
something to learn from. Those of LARGEST are the largest value of the first update,
before which nothing has moved: they show what differs though it should not.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flowgrpo_jax.rl.summation import ROUNDED, Summation

# |log-prob of the update - log-prob of the rollout|: 0 where both run the same program.
LARGEST = frozenset({"ratio_gap"})


def none_yet(names: Iterable[str], summation: Summation) -> dict[str, Array]:
    """The sums of measurements before the first microbatch."""
    nothing = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        name: jnp.zeros(()) if name in LARGEST else summation.start(nothing)
        for name in names
    }


def added(
    sums: Mapping[str, Array],
    info: Mapping[str, Array],
    weight: Array,
    summation: Summation = ROUNDED,
) -> dict[str, Array]:
    """`sums` with the measurements [slot, sibling] of one more microbatch."""

    def add(name, value):
        value = value.astype(jnp.float32)
        if name in LARGEST:
            return jnp.maximum(sums[name], jnp.max(jnp.where(weight > 0, value, 0.0)))
        return summation.add(sums[name], jnp.sum(weight * value))

    return {name: add(name, value) for name, value in info.items()}


def averaged(sums: Mapping[str, Array], scale: Array) -> dict[str, Array]:
    """Sums of one update over the mesh, times `scale`, 1 / their weight."""
    return {
        name: value if name in LARGEST else value * scale
        for name, value in sums.items()
    }


def of_iteration(
    info: Mapping[str, np.ndarray], weight: np.ndarray
) -> dict[str, float]:
    """One number each, of measurements [update] and the weights [update, ...].

    An update without any weight has learned nothing and measured nothing: it does not
    count, and if none has any, only those of LARGEST are told.
    """
    learned = np.asarray(weight).reshape(len(weight), -1).any(axis=1)
    metrics = {}
    for name, values in info.items():
        if name in LARGEST:
            metrics[name] = float(values[0])
        elif learned.any():
            metrics[name] = float(np.mean(values[learned]))
    return metrics
