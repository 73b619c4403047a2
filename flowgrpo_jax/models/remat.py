"""Rematerialisation: what of a block is kept for the backward pass, and what it takes.

The rest is computed again. Names are those that `jax.ad_checkpoint.checkpoint_name`
gives within a block; every transformer of this package uses the same ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from flowgrpo_jax.errors import not_one_of
from flowgrpo_jax.models.attention import SAVED


class Policy(NamedTuple):
    """One choice of `remat`.

    `kept`: names of the arrays that stay, beside the block's input; None for all that
    XLA asks for. `per_block`: what stays, in arrays of [token, width].
    """

    kept: tuple[str, ...] | None
    per_block: float


POLICIES: Mapping[str, Policy] = {
    "none": Policy(None, 24.0),
    # The block's input alone: a forward pass more of work, little memory.
    "full": Policy((), 1.0),
    # The MLP is computed again.
    "attention": Policy(("modulation", "qkv", SAVED), 5.0),
    # Only what lies between matmuls is computed again.
    "dense": Policy(("modulation", "qkv", SAVED, "hidden"), 9.0),
}


def rematerialized(block: Any, policy: str, in_scan: bool) -> Any:
    """The block under a policy; a scan needs no barrier against CSE.

    `block` is a module's class, or a function of a module that makes its layers in
    that module's own scope. UserError for a policy that is none of POLICIES.
    """
    if policy not in POLICIES:
        raise not_one_of("remat", policy, POLICIES)
    kept = POLICIES[policy].kept
    if kept is None:
        return block
    names = jax.checkpoint_policies.save_only_these_names(*kept)
    return nn.remat(block, prevent_cse=not in_scan, policy=names)
