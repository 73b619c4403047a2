"""Plans: which nodes they have, what they cost, whom they credit, what they refuse."""

import re

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import plan

ALL = tuple(range(10))
G = 24


def suffix(made: plan.Plan, leaf: int) -> list[int]:
    """Steps of the nodes that carry a leaf, down from its last action."""
    node = int(made.leaves[leaf])
    way = []
    while not made.nodes[node].trained:
        node = made.nodes[node].parent
        way.append(made.nodes[node].at)
    return way[::-1]


def g2rpo(*granularities):
    return plan.branches(
        16, tuple(range(8)), 12, granularities=granularities, whole_anchor=True
    )


@pytest.mark.parametrize(
    "made, evaluations, images, states, siblings",
    [
        (plan.chains(10, ALL, (ALL[:9],) * G), 240, 24, 216, 1),
        (plan.chains(10, (2, 3, 4), ((2, 3, 4),) * G, shared=True), 171, 24, 72, 1),
        (g2rpo(1, 2), 1504, 193, 8, 12),
        (g2rpo(1, 2, 3), 1708, 289, 8, 12),
        (plan.branches(10, ALL[:9], 6, anchors=4), 1116, 216, 36, 6),
        (plan.tree(20, (0, 3, 6, 9), 2, tuple(range(20)), tuple(range(19))), 203, 16)
        + (202, 1),
        (plan.chains(10, ALL, (ALL[:9],) * G, probe=10), 1320, 264, 216, 1),
    ],
)
def test_golden_costs(made, evaluations, images, states, siblings):
    """Oracle: golden_numbers.md 9."""
    assert len(made.evaluated) == evaluations
    assert len(made.leaves) == len(made.labels) == images
    assert len(made.states) == states
    assert made.siblings == siblings


def test_flash_finishes_in_fewer_steps():
    """Oracle: golden_numbers.md 9, l = 0 and q = .4 of T = 25: 13 a member."""
    steps = (0, 1, 2, 3)
    made = plan.chains(25, steps, (steps,) * 12, finish=plan.compressed(25, 4, 0.4))
    assert len(made.evaluated) == 156
    second = made.table[:, 4] > 0
    assert set(made.table[second, 1]) == set(plan.compressed(25, 4, 0.4))


@pytest.mark.parametrize(
    "k, g, visited",
    [
        (0, 2, [1, 2, 4, 6, 8, 10, 12, 14]),
        (3, 2, [4, 5, 7, 9, 11, 13]),
        (7, 2, [8, 9, 11, 13]),
        (7, 3, [8, 9, 12]),
        (7, 1, list(range(8, 16))),
    ],
)
def test_golden_suffixes_of_g2rpo(k, g, visited):
    """Oracle: golden_numbers.md 9."""
    made = g2rpo(1, 2, 3)
    wanted = [n for n, x in enumerate(made.labels) if (x.step, x.column) == (k, g - 1)]
    assert len(wanted) == 12
    assert all(suffix(made, leaf) == visited for leaf in wanted)


def test_g2rpo_credits_every_granularity_and_not_the_anchor():
    """Oracle: closed form; an action answers for its own finishes, no one for x_0."""
    made = g2rpo(1, 2)
    rows = np.array(made.credit)
    assert rows.shape == (96, 2)
    assert len(set(rows.flat)) == 192
    for node, row in zip(made.trained, rows, strict=True):
        step = made.nodes[made.nodes[node].parent].at
        assert [made.labels[leaf].step for leaf in row] == [step, step]
        assert [made.labels[leaf].column for leaf in row] == [0, 1]
    anchor = [n for n, label in enumerate(made.labels) if label.column < 0]
    assert len(anchor) == 1 and anchor[0] not in rows


def test_merged_steps_jump():
    """Oracle: closed form; the action at step 4 of merge 2 ends at 6."""
    made = plan.branches(16, (3, 4), 2, merge=(1, 2))
    ends = {
        (made.nodes[n].at, made.nodes[made.nodes[n].parent].at) for n in made.trained
    }
    assert ends == {(4, 3), (6, 4)}


def test_tree_credits_all_leaves_below():
    """Oracle: closed form; the first edges answer for half of the leaves each."""
    made = plan.tree(4, (0, 1), 2, (0, 1, 2, 3), (0, 1, 2))
    rows = [[leaf for leaf in row if leaf >= 0] for row in made.credit]
    starts = [made.nodes[made.nodes[n].parent].at for n in made.trained]
    sizes = {step: sorted(len(r) for r, s in zip(rows, starts, strict=True) if s == step)
             for step in (0, 1, 2)}  # fmt: skip
    assert sizes == {0: [2, 2], 1: [1] * 4, 2: [1] * 4}


def test_probes_credit_what_a_step_adds():
    """Oracle: golden_numbers.md 11; gains of a trajectory telescope to last - first."""
    made = plan.chains(5, tuple(range(5)), (tuple(range(5)),) * 3, probe=5)
    rewards = np.random.default_rng(0).normal(size=len(made.labels))
    rows = np.array(made.credit).reshape(3, 5, 2)
    gains = rewards[rows[..., 0]] - rewards[rows[..., 1]]
    first, last = rows[:, 0, 1], rows[:, -1, 0]
    np.testing.assert_allclose(gains.sum(1), rewards[last] - rewards[first])
    assert all(made.labels[leaf].column == 0 for leaf in last)


def test_parents_come_first():
    """Oracle: an invariance that packing and heights rely on."""
    for made in (g2rpo(1, 2, 3), plan.tree(6, (0, 2), 3, (0, 1, 2), (0, 1, 2))):
        assert (made.table[:, 0] < np.arange(len(made.nodes))).all()
        assert made.height[0] == made.height.max() == made.num_steps


def test_random_window_covers_its_range_uniformly():
    """Oracle: golden; T = 10, size 2, range (0, 10) gives starts 0..8, all alike.

    With 1800 draws a start's count is 200 +- 13.3 (one std): 5 std are allowed.
    """
    starts = [
        plan.random_window(10, 2, (0, 10), 42, iteration, prompt)[0]
        for iteration in range(60)
        for prompt in range(30)
    ]
    counts = np.bincount(starts, minlength=9)
    assert len(counts) == 9
    assert np.abs(counts - 200).max() < 5 * 13.3


def test_random_choices_are_pure_functions():
    """Oracle: an invariance; the same numbers again, others for another seed."""
    for draw in (
        lambda seed: plan.random_window(10, 1, (0, 10), seed, 3, 4),
        lambda seed: plan.random_subset(16, 0.6, seed, 3, 4, 5),
    ):
        assert draw(1) == draw(1)
        assert len({draw(seed) for seed in range(20)}) > 1
    subset = plan.random_subset(16, 0.6, 0, 0, 0, 0)
    assert len(subset) == 9 and max(subset) < 15 and list(subset) == sorted(subset)


def test_progressive_window_moves_and_rolls_back():
    """Oracle: golden; MixGRPO, T = 25, w = 4, tau = 25: starts 0..20, then 0 again."""

    def start(iteration, decay=0.0):
        return plan.progressive_window(25, 4, (0, 24), iteration, 25, decay)[0]

    assert [start(i) for i in (0, 24, 25, 499, 500, 524, 525)] == [
        0,
        0,
        1,
        19,
        20,
        20,
        0,
    ]
    # With decay the stay at start 20 is 25 exp(-.7): 12 iterations, not 25.
    stays = np.bincount([start(i, 0.1) for i in range(525)], minlength=21)
    assert stays[13] >= 25 and stays[20] == 12


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: plan.fraction(10, 0.05), "train.timestep_fraction: 0.05"),
        (lambda: plan.random_subset(10, 0.05, 0, 0, 0, 0), "train.timestep_fraction"),
        (
            lambda: plan.random_window(10, 3, (0, 2), 0, 0, 0),
            "sde_window_range: (0, 2)",
        ),
        (lambda: plan.random_window(10, 0, (0, 2), 0, 0, 0), "sde_window_range"),
        (lambda: plan.random_window(10, 1, (0, 11), 0, 0, 0), "sde_window_range"),
        (
            lambda: plan.branches(10, (9,), 4),
            "sample.num_steps: 10: too few for sample.branch_steps (9,)",
        ),
        (lambda: plan.branches(10, (), 4), "sample.branch_steps: ()"),
        (
            lambda: plan.branches(10, (1,), 4, merge=(1, 2)),
            "sample.merge_steps: (1, 2)",
        ),
        (
            lambda: plan.branches(10, (1,), 4, granularities=(0,)),
            "sample.granularities",
        ),
        (lambda: plan.tree(10, (5,), 2, (0, 1), (0, 1)), "sample.branch_steps: (5,)"),
        (lambda: plan.chains(10, (3, 2), ((2,),)), "stochastic steps (3, 2)"),
        (lambda: plan.chains(10, (2, 3), ((4,),)), "trained steps (4,)"),
    ],
)
def test_what_cannot_be_is_refused(make, key):
    """Oracle: the message names the key and its value."""
    with pytest.raises(UserError, match=re.escape(key)):
        make()
