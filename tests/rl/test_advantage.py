"""Advantages against golden numbers and invariances of groups."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl.advantage import advantages, best_and_worst, group_advantages

# Prompts a b a b a b c c of golden_numbers.md 5.
OWNER = np.array([0, 1, 0, 1, 0, 1, 2, 2])
REWARDS = np.array([1, 0, 0.5, 0, 0, 1, 0.3, 0.3])
# Half a unit of the sixth printed decimal, plus a float32 rounding near 1.
SIX_DIGITS = 0.5e-6 + 6e-8


@pytest.mark.parametrize(
    "std, golden",
    [
        ("global", [1.275476, -0.850318, 0, -0.850318, -1.275476, 1.700635, 0, 0]),
        ("group", [1.224445, -0.706957, 0, -0.706957, -1.224445, 1.413914, 0, 0]),
        ("none", [0.5, -1 / 3, 0, -1 / 3, -0.5, 2 / 3, 0, 0]),
    ],
)
def test_golden_advantages(std, golden):
    """Oracle: golden_numbers.md 5; closed form without a std."""
    advantages, stats = group_advantages(REWARDS, OWNER, std=std)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, golden, rtol=0, atol=SIX_DIGITS)
    np.testing.assert_array_equal(advantages[[2, 6, 7]], 0)
    assert stats["zero_std_ratio"] == pytest.approx(1 / 3)
    assert stats["reward_std_mean"] == pytest.approx(0.2932176, abs=0.5e-7)
    assert stats["group_size"] == pytest.approx(8 / 3)
    assert stats["trained_prompt_num_batch"] == 3


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_constant_groups_get_exact_zeros(std, eps):
    """Oracle: closed form; no rounding of a mean may leak through a small eps."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(50), 7)
    rewards = np.repeat(rng.normal(size=50), 7)
    advantages, stats = group_advantages(rewards, owner, std=std, eps=eps)
    np.testing.assert_array_equal(advantages, 0)
    assert stats["zero_std_ratio"] == 1 and stats["reward_std_mean"] == 0


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_float64_reference(std, ddof):
    """Oracle: numpy float64, group by group, for groups of different sizes."""
    rng = np.random.default_rng(1)
    owner = rng.integers(0, 6, size=60) * 1000 - 7
    rewards = rng.normal(size=60)
    advantages, _ = group_advantages(rewards, owner, std=std, ddof=ddof)
    for key in np.unique(owner):
        group = rewards[owner == key]
        scale = {
            "group": group.std(ddof=ddof) + 1e-4,
            "global": rewards.std(ddof=ddof) + 1e-4,
            "none": 1.0,
        }[std]
        expected = (group - group.mean()) / scale
        # float32 rounding of values below 4.
        np.testing.assert_allclose(advantages[owner == key], expected, atol=3e-7)


def test_order_of_samples_does_not_matter():
    """Oracle: invariance under a permutation of the samples."""
    order = np.random.default_rng(2).permutation(8)
    straight, stats = group_advantages(REWARDS, OWNER, std="group")
    permuted, permuted_stats = group_advantages(
        REWARDS[order], OWNER[order], std="group"
    )
    np.testing.assert_allclose(permuted, straight[order], rtol=1e-6)
    assert permuted_stats == pytest.approx(stats)


@pytest.mark.parametrize("ddof", [0, 1])
def test_group_of_one(ddof):
    """Oracle: closed form; alone, a sample equals its mean and has no spread."""
    rewards, owner = np.array([0.7, 0.0, 1.0]), np.array([5, 2, 2])
    advantages, stats = group_advantages(rewards, owner, std="group", ddof=ddof)
    assert advantages[0] == 0 and np.isfinite(advantages).all()
    assert stats["zero_std_ratio"] == 0.5


def test_clip_and_float32_rewards():
    """Oracle: closed form; one winner of 101 has z = 10, clipped to 5."""
    rewards = np.zeros(101, np.float32)
    rewards[3] = 1
    owner = np.zeros(101, np.int32)
    clipped, _ = group_advantages(rewards, owner, std="group")
    assert clipped[3] == 5
    free, _ = group_advantages(rewards, owner, std="group", clip=np.inf, eps=0.0)
    assert free[3] == pytest.approx(10)


def test_errors_name_key_and_value():
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match="advantage_std: batch: one of group, global"):
        group_advantages(REWARDS, OWNER, std="batch")
    broken = np.where(np.arange(8) == 3, np.nan, REWARDS)
    with pytest.raises(UserError, match="reward: nan of sample 3: must be finite"):
        group_advantages(broken, OWNER, std="group")
    for option, message in {
        "centre": "advantage_centre: x: one of mean, leave_one_out, none",
        "combine": "reward_combination: x: one of sum, zscore, advantage, "
        "advantage_mean, gdpo",
        "backup": "^backup: x: one of sum, mean, difference",
    }.items():
        with pytest.raises(UserError, match=message):
            one_leaf_per_edge(
                {"a": REWARDS}, {"a": 1.0}, OWNER, std="group", **{option: "x"}
            )
    with pytest.raises(UserError, match="reward.b: nan of sample 3: must be finite"):
        one_leaf_per_edge(
            {"a": REWARDS, "b": broken}, {"a": 1.0, "b": 1.0}, OWNER, std="group"
        )


def z_scores(values, keys, ddof=0, eps=1e-4):
    """Group by group with numpy's mean and std."""
    result = np.zeros(len(values))
    for key in np.unique(keys):
        group = values[keys == key]
        result[keys == key] = (group - group.mean()) / (group.std(ddof=ddof) + eps)
    return result


def one_leaf_per_edge(rewards, weights, owner, **options):
    credit = np.arange(len(owner))[:, None]
    return advantages(rewards, weights, owner, owner, credit, owner, **options)


def test_multi_granularity_of_g2rpo():
    """Oracle: golden_numbers.md 5, float64; z-scores (ddof 1) per prompt, step, granularity
    and reward, added up, then clipped."""
    rng = np.random.default_rng(3)
    prompts, steps, grains, members = 2, 3, 2, 6
    prompt, step, grain, member = np.indices((prompts, steps, grains, members))
    key = (prompt * steps + step) * grains + grain
    leaf = np.arange(key.size).reshape(key.shape)
    rewards = {
        "hps": rng.normal(0.3, 0.01, key.size),
        "clip": rng.normal(30, 5.0, key.size),
    }
    # A granularity that tells nothing for one of the rewards.
    rewards["hps"].reshape(key.shape)[1, 2, 0] = 0.1
    credit = np.moveaxis(leaf, 2, 3).reshape(-1, grains)
    edge_key = (prompt * steps + step)[:, :, 0].ravel()

    def ours(clip):
        return advantages(
            rewards,
            {"hps": 1.0, "clip": 1.0},
            prompt.ravel(),
            key.ravel(),
            credit,
            edge_key,
            std="group",
            ddof=1,
            eps=1e-8,
            clip=clip,
            combine="advantage",
        )

    parts = [z_scores(values, key.ravel(), 1, 1e-8) for values in rewards.values()]
    # numpy's mean of equal numbers is not exact.
    parts[0].reshape(key.shape)[1, 2, 0] = 0
    expected = np.sum(parts, axis=0)[credit].sum(axis=1)
    free, stats = ours(np.inf)
    np.testing.assert_allclose(free, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.bincount(edge_key, free), np.zeros(prompts * steps), atol=1e-5
    )
    clipped, _ = ours(1.5)
    np.testing.assert_array_equal(clipped, np.clip(free, -1.5, 1.5))
    assert (clipped != free).any()
    assert stats["group_size"] == members
    assert stats["trained_prompt_num_batch"] == prompts
    assert stats["zero_std_ratio"] == 0  # the other reward still tells


def test_a_silent_granularity_adds_exactly_nothing():
    """Oracle: closed form; 0 + z of the other granularity, bit for bit."""
    rewards = np.array([0.1, 0.1, 0.1, 0.2, 0.7, 0.4])
    grain = np.array([0, 0, 0, 1, 1, 1])
    credit = np.array([[0, 3], [1, 4], [2, 5]])
    zero = np.zeros(6, int)
    both, stats = advantages(
        {"a": rewards}, {"a": 1.0}, zero, grain, credit, zero[:3], std="group"
    )
    alone, _ = group_advantages(rewards[3:], zero[3:], std="group")
    np.testing.assert_array_equal(both, alone)
    assert stats["zero_std_ratio"] == 0.5


# A binary tree: edges 0 and 1 at the root's depth, 2 to 5 below, with a leaf each.
TREE = np.array([[0, 1], [2, 3], [0, -1], [1, -1], [2, -1], [3, -1]])
DEPTH = np.array([0, 0, 1, 1, 1, 1])


def of_tree(rewards, credit=TREE, edge_key=DEPTH, **options):
    prompt = np.zeros(len(rewards), int)
    options = {"std": "group", "eps": 0.0, "backup": "mean", **options}
    return advantages(
        {"a": np.array(rewards, float)},
        {"a": 1.0},
        prompt,
        prompt,
        credit,
        edge_key,
        **options,
    )


def test_tree_of_branch_grpo():
    """Oracle: by hand; values 0.5, 1 | 1, 0, 1, 1, each depth compared by itself."""
    found, stats = of_tree([1, 0, 1, 1])
    low, high = -(3**0.5), 3**-0.5
    np.testing.assert_allclose(found, [-1, 1, high, low, high, high], rtol=1e-6)
    assert stats["group_size"] == 3 and stats["zero_std_ratio"] == 0
    root, _ = of_tree(
        [1, 0, 1, 1], np.array([[0, 1, 2, 3]]), DEPTH[:1], std="none", centre="none"
    )
    assert root == 0.75


def test_equal_leaves_of_a_tree_are_exactly_nothing():
    """Oracle: closed form; (0.1 + 0.1 + 0.1) / 3 is not 0.1, yet nobody is better."""
    credit = np.array([[0, 1, 2], [3, -1, -1], [4, 5, -1]])
    found, stats = of_tree([0.1] * 6, credit, DEPTH[:1].repeat(3))
    np.testing.assert_array_equal(found, 0)
    assert stats["zero_std_ratio"] == 1


def test_probability_weighted_back_up():
    """Oracle: the recursion of TreeGRPO; a parent is the expectation of its children."""
    rewards = np.array([1.0, 0.2, 0.6, 0.1])
    ways = np.array([[0.7, 0.3], [0.4, 0.6]])  # of the children of the first two edges
    weight = np.vstack([ways, np.ones((4, 2))])
    found, _ = of_tree(rewards, backup="sum", credit_weight=weight)
    leaf = z_scores(rewards, np.zeros(4), eps=0)
    parents = np.sum(ways * leaf.reshape(2, 2), axis=1)
    np.testing.assert_allclose(found, np.append(parents, leaf), rtol=1e-6)
    mean, _ = of_tree(rewards, credit_weight=weight, std="none", centre="none")
    parents = np.sum(ways * rewards.reshape(2, 2), axis=1)
    np.testing.assert_allclose(mean, np.append(parents, rewards), rtol=1e-6)


def test_step_gains_of_dense_grpo():
    """Oracle: golden_numbers.md 11; gains telescope to last - first reward, and
    each step is compared by itself."""
    samples, steps = 5, 4
    table = np.random.default_rng(4).normal(size=(samples, steps + 1))
    leaf = np.arange(table.size).reshape(table.shape)
    credit = np.stack([leaf[:, 1:].ravel(), leaf[:, :-1].ravel()], axis=1)
    edge_key = np.tile(np.arange(steps), samples)
    prompt = np.zeros(table.size, int)

    def ours(**options):
        found, _ = advantages(
            {"a": table.ravel()},
            {"a": 1.0},
            prompt,
            prompt,
            credit,
            edge_key,
            backup="difference",
            **options,
        )
        return found.reshape(samples, steps)

    raw = ours(std="none", centre="none", clip=np.inf)
    np.testing.assert_allclose(raw.sum(1), table[:, -1] - table[:, 0], atol=1e-6)
    gains = np.diff(table, axis=1)
    expected = (gains - gains.mean(0)) / (gains.std(0) + 1e-4)
    np.testing.assert_allclose(ours(std="group"), expected, rtol=1e-5, atol=1e-6)
    credit[3, 1] = -1
    with pytest.raises(ValueError, match="difference is that of two leaves"):
        ours(std="group")


@pytest.mark.parametrize("backup", ["sum", "mean", "difference"])
def test_an_edge_without_leaves_takes_no_part(backup):
    """Oracle: invariance under padding edges."""
    rewards = [1.0, 0.2, 0.6, 0.1]
    credit = np.array([[0, 1], [2, 3], [1, 2]])
    key = np.zeros(3, int)
    bare, stats = of_tree(rewards, credit, key, backup=backup)
    padded = np.insert(credit, [0, 2], -1, axis=0)
    found, same = of_tree(rewards, padded, np.zeros(5, int), backup=backup)
    np.testing.assert_array_equal(found[[1, 2, 4]], bare)
    np.testing.assert_array_equal(found[[0, 3]], 0)
    assert same == stats


def several(count=40, prompts=5):
    rng = np.random.default_rng(5)
    owner = rng.integers(0, prompts, count)
    rewards = {"a": rng.normal(size=count), "b": 7 + 50 * rng.normal(size=count)}
    return rewards, {"a": 2.0, "b": 0.5}, owner


def test_ways_to_combine_rewards():
    """Oracle: float64; before, after, and after with the batch's std."""
    rewards, weights, owner = several()
    own = sum(weights[name] * z_scores(rewards[name], owner) for name in weights)
    expected = {
        "sum": z_scores(sum(weights[n] * rewards[n] for n in weights), owner),
        "zscore": z_scores(
            sum(
                weights[n] * (r - r.mean()) / (r.std() + 1e-4)
                for n, r in rewards.items()
            ),
            owner,
        ),
        "advantage": own,
        "advantage_mean": own / 2.5,
        "gdpo": (own - own.mean()) / (own.std() + 1e-4),
    }
    for how, values in expected.items():
        found, _ = one_leaf_per_edge(rewards, weights, owner, std="group", combine=how)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["zscore", "advantage", "gdpo"])
def test_the_unit_of_a_reward_does_not_matter(how):
    """Oracle: invariance; with eps 0, and not so for the raw sum."""
    rewards, weights, owner = several()
    options = {"std": "group", "eps": 0.0}
    scaled = {"a": rewards["a"], "b": 1000 * rewards["b"] - 3}

    def both(how):
        for table in (rewards, scaled):
            yield one_leaf_per_edge(table, weights, owner, combine=how, **options)[0]

    first, second = both(how)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    first, second = both("sum")
    assert abs(first - second).max() > 0.01


@pytest.mark.parametrize("how", ["sum", "zscore", "advantage", "gdpo"])
@pytest.mark.parametrize("centre", ["mean", "leave_one_out"])
def test_constant_groups_get_exact_zeros_however_combined(how, centre):
    """Oracle: closed form; the other groups' rounding must not leak into them."""
    rewards, weights, owner = several()
    for name in rewards:
        rewards[name][owner == 2] = 0.1
    found, _ = one_leaf_per_edge(
        rewards, weights, owner, std="group", eps=0.0, combine=how, centre=centre
    )
    np.testing.assert_array_equal(found[owner == 2], 0)
    assert found[owner != 2].all()


@pytest.mark.parametrize("how", ["sum", "zscore", "advantage", "gdpo"])
def test_a_reward_of_weight_0_takes_no_part(how):
    """Oracle: invariance, for a reward that is not even finite."""
    rewards, weights, owner = several()
    extra = rewards | {"only_measured": np.full(len(owner), np.nan)}
    first, _ = one_leaf_per_edge(rewards, weights, owner, std="group", combine=how)
    second, _ = one_leaf_per_edge(
        extra, weights | {"only_measured": 0.0}, owner, std="group", combine=how
    )
    np.testing.assert_array_equal(first, second)


def test_leave_one_out():
    """Oracle: by hand; the reward above the mean of the others, alone above nothing."""
    rewards = np.array([1.0, 0.0, 0.5, 9.0])
    owner = np.array([0, 0, 0, 1])
    found, _ = one_leaf_per_edge(
        {"a": rewards}, {"a": 1.0}, owner, std="none", centre="leave_one_out"
    )
    np.testing.assert_allclose(found, [0.75, -0.75, 0, 0])


def test_raw_rewards():
    """Oracle: by hand; no centre and no std leave the weighted reward (RWR), and a
    group's std has nothing to say about a group of equal rewards."""
    rewards = {"a": np.array([1.0, 3.0, 0.5, 0.5])}
    owner = np.array([0, 0, 1, 1])
    raw, _ = one_leaf_per_edge(rewards, {"a": 0.5}, owner, std="none", centre="none")
    np.testing.assert_array_equal(raw, [0.5, 1.5, 0.25, 0.25])
    scaled, _ = one_leaf_per_edge(
        rewards, {"a": 1.0}, owner, std="group", centre="none", eps=0.0
    )
    np.testing.assert_array_equal(scaled, [1, 3, 0, 0])


def test_best_and_worst():
    """Oracle: by hand; two interleaved groups, with ties, in the order of the keys."""
    group = np.array([8, 3, 8, 3, 8, 3, 8, 3])
    rewards = np.array([0.5, 1.0, 0.9, 0.0, 0.9, 0.0, 0.1, 1.0])
    np.testing.assert_array_equal(
        best_and_worst(rewards, group, 1, 1), [[1, 3], [2, 6]]
    )
    np.testing.assert_array_equal(best_and_worst(rewards, group, 1, 0), [[1], [2]])
    np.testing.assert_array_equal(
        best_and_worst(rewards, group, 2, 2), [[1, 7, 3, 5], [2, 4, 6, 0]]
    )


def test_nobody_is_both_best_and_worst():
    """Oracle: by hand; of equal rewards the first is best and the next is worst."""
    picked = best_and_worst(np.full(4, 0.3), np.zeros(4, int), 1, 2)
    np.testing.assert_array_equal(picked, [[0, 1, 2]])


def test_selection_errors():
    """Oracle: the text of the error a user reads."""
    with pytest.raises(UserError, match="group_size: 2: at least 4 best"):
        best_and_worst(REWARDS, OWNER, 4, 4)
    with pytest.raises(UserError, match="reward: inf of sample 1: must be finite"):
        best_and_worst(np.array([0.0, np.inf]), np.zeros(2, int), 1, 1)
