"""Advantages: how much better an action is than the others of its group.

Host code in float64 that sees rewards and integer keys only, never a model. Images
are leaves, trained actions are edges, and three small steps lead from the rewards of
the ones to the advantages of the others:

    combine     several rewards become one number
    normalise   numbers are compared with those that share a key
    back up     an edge gets its number from the leaves it is credited with

Flow-GRPO (arXiv 2505.05470) and G2RPO (arXiv 2510.01982) compare leaves and add up
what an edge is credited with; BranchGRPO (arXiv 2509.06040) and DenseGRPO (arXiv
2601.20218) first give edges a value, and then compare edges.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from flowgrpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AdvantageSpec:
    """What is compared with what; see `advantages` for all but the first two.

    `weights`: of the rewards by name. `key`: images of one "prompt" are a group, or
    those of one "step" or "anchor" of it.
    """

    weights: Mapping[str, float]
    key: str
    std: str
    ddof: int
    eps: float
    clip: float
    backup: str
    combine: str
    centre: str

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `advantages`."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in ("weights", "key")}


STDS = ("group", "global", "none")
CENTRES = ("mean", "leave_one_out", "none")
COMBINES = ("sum", "zscore", "advantage", "advantage_mean", "gdpo")
BACKUPS = ("sum", "mean", "difference")


def advantages(
    rewards: Mapping[str, Float[np.ndarray, " leaf"]],
    weights: Mapping[str, float],
    leaf_prompt: Int[np.ndarray, " leaf"],
    leaf_key: Int[np.ndarray, " leaf"],
    credit: Int[np.ndarray, "edge column"],
    edge_key: Int[np.ndarray, " edge"],
    *,
    std: str,
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float = 5.0,
    backup: str = "sum",
    combine: str = "sum",
    centre: str = "mean",
    credit_weight: Float[np.ndarray, "edge column"] | None = None,
) -> tuple[Float32[np.ndarray, " edge"], dict[str, float]]:
    """Advantage of every edge, clipped last, and metrics of the groups.

    A row of `credit` holds the leaves that an edge answers for; -1 is an empty entry,
    and an edge without any leaf gets 0 and takes no part. Groups of equal values get
    exact zeros, so `advantages != 0` tells which edges can teach anything (not so for
    `centre` "none", unless `std` is "group"). `backup` says what is compared:

    - "sum": leaves, with those of the same `leaf_key`; an edge gets the sum of its
      leaves' advantages. Flow-GRPO has one leaf per edge and the prompt as key; G2RPO
      one column per granularity, and prompt x step x granularity as key.
    - "mean": edges, with those of the same `edge_key` (prompt x depth), by the mean of
      their leaves' rewards (BranchGRPO).
    - "difference": edges, with those of the same `edge_key` (prompt x step), by the
      reward of their first leaf above that of their second (DenseGRPO).

    `credit_weight` weighs an edge's leaves in "sum" and "mean". With the probabilities
    of the ways from an edge down to its leaves "sum" is TreeGRPO (arXiv 2512.08153).
    See `combined` for `combine`, and `normalise` for `centre`, `std`, `ddof`, `eps`.
    A reward of weight 0 takes no part.

    Metrics are those of the compared groups, on the weighted sum of raw rewards (see
    `group_statistics`); trained_prompt_num_batch is the number of different prompts.
    UserError for an unknown option or a reward that is not finite.
    """
    _check_option("advantage_std", std, STDS)
    _check_option("advantage_centre", centre, CENTRES)
    _check_option("reward_combination", combine, COMBINES)
    _check_option("backup", backup, BACKUPS)
    weights = {name: weight for name, weight in weights.items() if weight}
    for name in weights:
        _check_finite(f"reward.{name}", rewards[name])
    tables = {name: rewards[name].astype(np.float64) for name in weights}

    used = (credit >= 0).any(axis=1)
    leaves_of = functools.partial(
        back_up,
        credit=credit[used],
        how=backup,
        credit_weight=None if credit_weight is None else credit_weight[used],
    )
    group = leaf_key
    if backup != "sum":
        tables = {name: leaves_of(table) for name, table in tables.items()}
        group = edge_key[used]

    compare = functools.partial(
        normalise, group=group, centre=centre, std=std, ddof=ddof, eps=eps
    )
    values = combined(tables, weights, combine, compare, ddof=ddof, eps=eps)
    if backup == "sum":
        values = leaves_of(values)

    of_edges = np.zeros(len(credit), np.float32)
    of_edges[used] = np.clip(values, -clip, clip)
    stats = group_statistics(weighted_sum(tables, weights), group)
    stats["trained_prompt_num_batch"] = float(len(np.unique(leaf_prompt)))
    return of_edges, stats


def group_advantages(
    rewards: Float[np.ndarray, " sample"],
    owner: Int[np.ndarray, " sample"],
    *,
    std: str,
    eps: float = 1e-4,
    clip: float = 5.0,
    ddof: int = 0,
) -> tuple[Float32[np.ndarray, " sample"], dict[str, float]]:
    """(reward - mean of its group) / (std + eps), clipped (Flow-GRPO, eq. 4).

    `advantages` for one reward, one action per sample, and samples with the same
    `owner` as a group, wherever they stand.
    """
    _check_finite("reward", rewards)
    one_each = np.arange(len(rewards))[:, None]
    return advantages(
        {"avg": rewards},
        {"avg": 1.0},
        leaf_prompt=owner,
        leaf_key=owner,
        credit=one_each,
        edge_key=owner,
        std=std,
        eps=eps,
        clip=clip,
        ddof=ddof,
    )


def normalise(
    values: Float[np.ndarray, " item"],
    group: Int[np.ndarray, " item"],
    *,
    centre: str,
    std: str,
    ddof: int,
    eps: float,
) -> Float64[np.ndarray, " item"]:
    """Values against those of the same group: (value - centre) / (std + eps).

    `centre` is the group's mean, the mean of the others ("leave_one_out", as RLOO,
    arXiv 2402.14740), or 0 ("none"). `std`, with `ddof`, is that of the "group" (as the
    paper of Flow-GRPO), of all values ("global", as its code), or 1 ("none"). Where
    that std is 0 there is nothing to compare: exact zeros.
    """
    _, index, size = np.unique(group, return_inverse=True, return_counts=True)
    deviation = _deviation(values, index, size)
    if centre == "none":
        centred = values.astype(np.float64)
    elif centre == "leave_one_out":
        centred = deviation * (size / np.maximum(size - 1, 1))[index]
    else:
        centred = deviation

    if std == "group":
        squares = np.bincount(index, deviation**2)
        return centred / _scale(squares, size, ddof, eps)[index]
    if std == "global":
        return centred / _scale_of_all(values, ddof, eps)
    return centred


def combined(
    tables: Mapping[str, Float[np.ndarray, " item"]],
    weights: Mapping[str, float],
    how: str,
    compare: Callable[[np.ndarray], np.ndarray],
    *,
    ddof: int,
    eps: float,
) -> Float64[np.ndarray, " item"]:
    """One advantage per item from several rewards.

    - "sum": `compare` (a `normalise` with its options) of the weighted raw sum.
    - "zscore": the same of rewards that are first brought to mean 0 and std 1 over the
      whole batch, so that weights do not depend on units (with groups of any spread).
    - "advantage": the weighted sum of each reward's own `compare`, so that the unit of
      a reward does not matter (G2RPO).
    - "advantage_mean": that over the sum of weights (MixGRPO, arXiv 2507.21802).
    - "gdpo": the sum, divided by its std over the whole batch, which keeps its size the
      same for any number of rewards (GDPO, arXiv 2601.05242). The batch's mean is that
      of the groups, 0; taking it off again would only add a rounding.
    """
    if how == "zscore":
        tables = {name: _zscores(table, ddof, eps) for name, table in tables.items()}
    if how in ("sum", "zscore"):
        return compare(weighted_sum(tables, weights))
    own = {name: compare(table) for name, table in tables.items()}
    total = weighted_sum(own, weights)
    if how == "advantage_mean":
        return total / sum(weights.values())
    return total / _scale_of_all(total, ddof, eps) if how == "gdpo" else total


def weighted_sum(
    tables: Mapping[str, Float[np.ndarray, " item"]], weights: Mapping[str, float]
) -> Float64[np.ndarray, " item"]:
    """Sum of weight * table over the names in `weights`."""
    terms = [weight * tables[name] for name, weight in weights.items()]
    return np.asarray(np.sum(terms, axis=0), np.float64)


def back_up(
    values: Float[np.ndarray, " leaf"],
    credit: Int[np.ndarray, "edge column"],
    how: str,
    credit_weight: Float[np.ndarray, "edge column"] | None = None,
) -> Float64[np.ndarray, " edge"]:
    """From leaves to edges, each of which has one leaf at least; see `advantages`.

    ValueError if "difference" does not find two leaves for every edge.
    """
    filled = credit >= 0
    of_leaf = np.where(filled, values[credit], 0.0)
    if how == "difference":
        if credit.shape[1] != 2 or not filled.all():
            raise ValueError("credit: a difference is that of two leaves per edge")
        return of_leaf[:, 0] - of_leaf[:, 1]
    weight = filled * (1.0 if credit_weight is None else credit_weight)
    if how == "sum":
        return np.sum(weight * of_leaf, axis=1)
    # Above the lowest, so that the mean of equal leaves is exactly their value.
    lowest = np.min(of_leaf, axis=1, where=filled, initial=np.inf)
    above = of_leaf - lowest[:, None]
    return lowest + np.sum(weight * above, axis=1) / np.sum(weight, axis=1)


def group_statistics(
    values: Float[np.ndarray, " item"], group: Int[np.ndarray, " item"]
) -> dict[str, float]:
    """zero_std_ratio, reward_std_mean and group_size.

    The share of groups of equal values, the mean over groups of their population std,
    and the mean size of a group.
    """
    _, index, size = np.unique(group, return_inverse=True, return_counts=True)
    squares = np.bincount(index, _deviation(values, index, size) ** 2)
    return {
        "zero_std_ratio": float(np.mean(squares == 0)),
        "reward_std_mean": float(np.mean(np.sqrt(squares / size))),
        "group_size": float(np.mean(size)),
    }


def best_and_worst(
    rewards: Float[np.ndarray, " sample"],
    group: Int[np.ndarray, " sample"],
    n_best: int,
    n_worst: int,
) -> Int[np.ndarray, "group picked"]:
    """Indices of each group's best samples, best first, then worst, worst first.

    Online DPO trains on (1, 1), SFT on (1, 0), DanceGRPO for video (arXiv 2505.07818)
    on (4, 4). Groups come in the order of their keys. Of equal samples that with the
    lowest index is taken first, and none twice. UserError if a group is too small or a
    reward is not finite.
    """
    _check_finite("reward", rewards)
    keys, size = np.unique(group, return_counts=True)
    if size.min() < n_best + n_worst:
        raise UserError(
            f"group_size: {size.min()}: at least {n_best} best + {n_worst} worst"
        )

    def pick(key):
        members = np.flatnonzero(group == key)
        order = members[np.argsort(-rewards[members], kind="stable")]
        others = np.sort(order[n_best:])
        order_of_others = others[np.argsort(rewards[others], kind="stable")]
        return np.concatenate([order[:n_best], order_of_others[:n_worst]])

    return np.stack([pick(key) for key in keys])


def _deviation(values, index, size):
    """Values above the mean of their group, number `index` of `size` members.

    Above the group's minimum equal values are exactly 0, and so are their mean and
    std; a rounded mean of the raw values would leave noise.
    """
    lowest = np.full(len(size), np.inf)
    np.minimum.at(lowest, index, values)
    above = values - lowest[index]
    return above - (np.bincount(index, above) / size)[index]


def _scale(squares, size, ddof, eps):
    """std + eps from the sum of squared deviations; infinite where there are none."""
    std = np.sqrt(squares / np.maximum(size - ddof, 1))
    return np.where(std > 0, std + eps, np.inf)


def _scale_of_all(values, ddof, eps):
    deviation = _deviation_of_all(values)
    return _scale(np.sum(deviation**2), len(values), ddof, eps)


def _zscores(values, ddof, eps):
    return _deviation_of_all(values) / _scale_of_all(values, ddof, eps)


def _deviation_of_all(values):
    return _deviation(values, np.zeros(len(values), int), np.array([len(values)]))


def _check_option(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value}: one of {', '.join(allowed)}")


def _check_finite(key: str, rewards: Float[np.ndarray, " sample"]) -> None:
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise UserError(f"{key}: {rewards[bad[0]]} of sample {bad[0]}: must be finite")
