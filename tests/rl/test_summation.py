"""Exact sums: equal in any order, and right, against Python's fractions."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.rl import summation
from flowgrpo_jax.rl.summation import EXACT, ROUNDED


@jax.jit
def exact_sum(rows):
    """The sum over the leading axis, one row after the other."""
    start = EXACT.start(jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32))
    total, _ = jax.lax.scan(lambda sum, row: (EXACT.add(sum, row), None), start, rows)
    return EXACT.whole(total)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    """[count, 64] of both signs and of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-12, 4, (count, 64))
    return (sizes * rng.choice([-1, 1], (count, 64))).astype(np.float32)


def test_the_order_does_not_matter():
    """Oracle: an invariance; fp32 additions of the same numbers differ."""
    rows = numbers(200)
    turned = np.random.default_rng(1).permutation(rows)
    assert (np.sum(rows, axis=0) != np.sum(turned, axis=0)).any()
    np.testing.assert_array_equal(exact_sum(rows), exact_sum(turned))


def test_parts_of_any_size_have_the_sum_of_all():
    """Oracle: an invariance; sums of devices, added as integers."""
    rows = jnp.asarray(numbers(60))

    def part(rows):
        start = EXACT.start(jax.ShapeDtypeStruct(rows.shape[1:], jnp.float32))
        for row in rows:
            start = EXACT.add(start, row)
        return start

    for parts in (2, 3, 5):
        total = sum(part(rows[k::parts]) for k in range(parts))
        np.testing.assert_array_equal(EXACT.whole(total), exact_sum(rows))


def test_the_sum_is_that_of_fractions():
    """Oracle: exact rational arithmetic; to two units in the last place."""
    rows = numbers(200)
    # What is below the smallest unit is cut off, at most once a number.
    cut = 200 * summation.UNITS[-1]
    for mine, column in zip(np.asarray(exact_sum(rows)), rows.T, strict=True):
        truth = float(sum(map(Fraction, column.tolist())))
        assert abs(mine - truth) <= 2 * np.spacing(np.float32(abs(truth))) + cut


@pytest.mark.parametrize("value", [1.0, -1.0, 2.0**-64, -(2.0**-64), 1e-10, -3.7e6])
def test_one_number_stays_itself(value):
    """Oracle: by hand; also beside a pair that goes away."""
    value = np.float32(value)
    rows = np.array([[1e5], [value], [-1e5]], np.float32)
    assert float(exact_sum(rows)[0]) == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**24])
def test_what_cannot_be_added_is_nan(bad):
    """Oracle: by hand; nothing is wrapped around or left out silently."""
    assert np.isnan(exact_sum(np.array([[1.0], [bad]], np.float32)))[0]
    # Nor a sum that grows out of its range.
    assert np.isnan(exact_sum(np.full((3, 1), 2.0**23, np.float32)))[0]


def test_both_kinds_take_trees():
    """Oracle: by hand."""
    tree = {"a": jnp.full(3, 0.5), "b": jnp.float32(2)}
    for kind in (EXACT, ROUNDED):
        total = kind.add(kind.add(kind.start(tree), tree), tree)
        found = kind.whole(total)
        np.testing.assert_array_equal(found["a"], [1, 1, 1])
        assert found["b"] == 4
