"""Plans: which steps they choose, that they are stateless, what they refuse."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import plan


def test_all_steps_trains_the_first_of_them():
    """Oracle: golden; fraction 0.99 of 10 steps trains 9, all 10 are stochastic."""
    steps = plan.all_steps(10)
    assert steps.stochastic == tuple(range(10))
    assert steps.trained == tuple(range(9))
    assert plan.all_steps(10, 0.5).trained == tuple(range(5))
    assert plan.all_steps(10, 1.0).trained == tuple(range(10))
    assert not steps.shared_noise


def test_window_and_branch():
    """Oracle: closed form of the chosen indices."""
    assert plan.window(10, 3, 2) == plan.Plan(10, (3, 4), (3, 4))
    assert plan.branch(16, 7) == plan.Plan(16, (7,), (7,), shared_noise=True)


def test_plans_are_hashable_values():
    """Oracle: invariance; equal plans are one key."""
    assert len({plan.window(10, 3, 2), plan.window(10, 3, 2), plan.branch(10, 3)}) == 2


def test_random_window_covers_its_range_uniformly():
    """Oracle: golden; T = 10, size 2, range (0, 10) gives starts 0..8, all alike.

    With 1800 draws a start's count is 200 +- 13.3 (one std): 5 std are allowed.
    """
    starts = [
        plan.random_window(10, 2, (0, 10), 42, iteration, prompt).trained[0]
        for iteration in range(60)
        for prompt in range(30)
    ]
    values, counts = np.unique(starts, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(9))
    assert np.abs(counts - 200).max() < 5 * 13.3


def test_random_window_is_a_pure_function_of_its_keys():
    """Oracle: invariance, and values pinned so that resumed runs stay the same."""

    def starts(seed, iteration, prompt):
        drawn = plan.random_window(50, 2, (0, 50), seed, iteration, prompt)
        return drawn.trained[0]

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3)]
    first = [starts(*key) for key in keys]
    assert first == [starts(*key) for key in reversed(keys)][::-1]
    assert first == [1, 33, 35, 22, 46]


def test_random_window_of_full_size_has_one_place():
    """Oracle: closed form; a window as large as its range cannot move."""
    assert plan.random_window(8, 3, (2, 5), 0, 5, 1) == plan.window(8, 2, 3)


def test_stack_tables():
    """Oracle: closed form, one row per prompt."""
    tables = plan.stack([plan.window(4, 0, 2), plan.window(4, 2, 2)])
    np.testing.assert_array_equal(tables.stochastic, [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(tables.trained, [[0, 1], [2, 3]])
    assert tables.stochastic.dtype == np.float32 and tables.trained.dtype == np.int32


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: plan.all_steps(10, 0.05),
            "timestep_fraction: 0.05: it trains 0 of 10",
        ),
        (lambda: plan.all_steps(10, 1.1), "timestep_fraction: 1.1: it trains 11 of 10"),
        (lambda: plan.window(10, 9, 2), r"plan.stochastic: \(9, 10\): .* 0..9"),
        (lambda: plan.window(10, 3, 0), r"plan.trained: \(\): one or more"),
        (lambda: plan.branch(10, -1), "plan.stochastic"),
        (lambda: plan.Plan(4, (0, 1), (2,)), r"plan.trained: \(2,\)"),
        (lambda: plan.Plan(4, (1, 0), (0,)), "plan.stochastic"),
        (
            lambda: plan.random_window(10, 4, (0, 3), 0, 0, 0),
            r"sde_window_range: \(0, 3\)",
        ),
        (lambda: plan.random_window(10, 2, (0, 11), 0, 0, 0), "sde_window_range"),
        (lambda: plan.random_window(10, 0, (0, 5), 0, 0, 0), "sde_window_range"),
        (lambda: plan.stack([plan.window(4, 0, 2), plan.window(4, 0, 1)]), "plans: "),
        (lambda: plan.stack([plan.window(4, 0, 1), plan.branch(4, 0)]), "plans: "),
        (lambda: plan.stack([]), "plans: "),
    ],
)
def test_errors_name_key_and_value(call, message):
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match=message):
        call()
