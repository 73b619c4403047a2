"""How gradients are added up: as fp32 numbers, or exactly, in any order.

fp32 additions round, so a sum depends on its order, and that on how many devices share
the microbatches. `Exact` adds whole numbers instead: every fp32 number becomes multiples
of four units, 2^2, 2^-20, 2^-42 and 2^-64, as integers ("limbs"). Integers add up to the
same in any order and on any mesh; only the end is rounded to fp32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

LIMB = 22  # bits of a limb; 2^9 devices can add theirs without overflow
TOP = 2.0**24  # no number and no device's sum may reach this
UNITS = tuple(TOP * 2.0 ** (-LIMB * (place + 1)) for place in range(4))
_BAD = len(UNITS)  # the last row counts what is too large, or no number
ROWS = _BAD + 1  # 32-bit numbers of a sum


class Summation(NamedTuple):
    """Sums of trees: `start` from shapes, `add` a tree of fp32, `whole` sum of fp32."""

    start: Callable[[Any], Any]
    add: Callable[[Any, Any], Any]
    whole: Callable[[Any], Any]


def of_limbs(values: Float[Array, "..."]) -> Int32[Array, "limb ..."]:
    """fp32 numbers as limbs; what is below 2^-64 is cut off towards zero."""
    fits = jnp.abs(values) < TOP  # not so for NaN
    rest = jnp.where(fits, values, 0.0)
    limbs = []
    for unit in UNITS:
        # Exact: powers of two, and a cut at a bit.
        limb = jnp.trunc(rest / unit)
        rest = rest - limb * unit
        limbs.append(limb.astype(jnp.int32))
    return jnp.stack([*limbs, (~fits).astype(jnp.int32)])


def carried(limbs: Int32[Array, "limb ..."]) -> Int32[Array, "limb ..."]:
    """The same sum with every limb but the first in [0, 2^22)."""
    rows = list(limbs)
    for place in range(_BAD - 1, 0, -1):
        above = rows[place] >> LIMB
        rows[place] = rows[place] - (above << LIMB)
        rows[place - 1] = rows[place - 1] + above
    rows[_BAD] += (jnp.abs(rows[0]) >= 1 << LIMB).astype(jnp.int32)
    return jnp.stack(rows)


def to_float(limbs: Int32[Array, "limb ..."]) -> Float[Array, "..."]:
    """The sum as fp32, to its last digit or two; NaN where it has left the range."""
    bad = limbs[_BAD] > 0
    limbs = carried(limbs)
    # Of a small negative sum the first limb is -1 and the others are nearly full: as
    # fp32 they would cancel. So the size is made first, then the sign.
    negative = limbs[0] < 0
    size = carried(jnp.where(negative, -limbs, limbs))
    total = jnp.zeros(limbs.shape[1:])
    for place in range(_BAD - 1, -1, -1):
        total = total + size[place].astype(jnp.float32) * UNITS[place]
    return jnp.where(bad, jnp.nan, jnp.where(negative, -total, total))


def _add_limbs(total: Any, values: Any) -> Any:
    return jax.tree.map(lambda a, b: carried(a + of_limbs(b)), total, values)


def _no_limbs(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((ROWS, *x.shape), jnp.int32), like)


ROUNDED = Summation(
    start=lambda like: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like),
    add=lambda total, values: jax.tree.map(jnp.add, total, values),
    whole=lambda total: total,
)
EXACT = Summation(
    start=_no_limbs,
    add=_add_limbs,
    whole=lambda total: jax.tree.map(to_float, total),
)
