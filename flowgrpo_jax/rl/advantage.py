"""Advantages: how much better a sample is than the others of its group.

Host code in float64 that sees rewards and integer keys only, never a model.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int

from flowgrpo_jax.errors import UserError

STDS = ("group", "global", "none")


def group_advantages(
    rewards: Float[np.ndarray, " sample"],
    owner: Int[np.ndarray, " sample"],
    *,
    std: str,
    eps: float = 1e-4,
    clip: float = 5.0,
    ddof: Literal[0, 1] = 0,
) -> tuple[Float32[np.ndarray, " sample"], dict[str, float]]:
    """(reward - mean of its group) / (std + eps), clipped (Flow-GRPO, eq. 4).

    Samples with the same `owner` are one group, wherever they stand. `std` is that
    of the "group" (as the paper), of all rewards ("global", as the official code)
    or "none" for 1. A group of equal rewards gets exact zeros, so `advantages != 0`
    tells which samples can teach anything.

    Also returns the metrics zero_std_ratio (share of groups of equal rewards),
    reward_std_mean (mean over groups of the population std), group_size (mean) and
    trained_prompt_num_batch (groups). UserError if a reward is not finite.
    """
    if std not in STDS:
        raise UserError(f"advantage_std: {std}: one of {', '.join(STDS)}")
    if not np.isfinite(rewards).all():
        bad = np.flatnonzero(~np.isfinite(rewards))
        raise UserError(f"reward: {rewards[bad[0]]} of sample {bad[0]}: must be finite")
    rewards = rewards.astype(np.float64)
    _, group, size = np.unique(owner, return_inverse=True, return_counts=True)

    # Above the group's minimum equal rewards are exactly 0, and so are their mean
    # and std; a rounded mean of the raw rewards would leave noise.
    lowest = np.full(len(size), np.inf)
    np.minimum.at(lowest, group, rewards)
    above = rewards - lowest[group]
    centred = above - (np.bincount(group, above) / size)[group]
    squares = np.bincount(group, centred**2)

    if std == "group":
        scale = np.sqrt(squares / np.maximum(size - ddof, 1))[group] + eps
    elif std == "global":
        scale = np.full_like(rewards, rewards.std(ddof=ddof) + eps)
    else:
        scale = np.ones_like(rewards)
    # With eps = 0 a constant group would be 0 / 0.
    advantages = np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 0)
    stats = {
        "zero_std_ratio": float(np.mean(squares == 0)),
        "reward_std_mean": float(np.mean(np.sqrt(squares / size))),
        "group_size": float(np.mean(size)),
        "trained_prompt_num_batch": float(len(size)),
    }
    return np.clip(advantages, -clip, clip).astype(np.float32), stats
