"""Advantages against golden numbers and invariances of groups."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl.advantage import group_advantages

# Prompts a b a b a b c c of flow_grpo.md 2.3.
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
    """Oracle: golden numbers, flow_grpo.md 2.3; closed form without a std."""
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
