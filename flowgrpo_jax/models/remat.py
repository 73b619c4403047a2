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
    XLA asks for. `per_block`: what stays, in arrays of [token, width]. `again`: the
    share of a forward pass's products with weights that is computed once more where
    only a LoRA learns, and where all learns: then the gradients of the gates ask for
    what the layers before them gave. `attention`: whether attention is, too.
    """

    kept: tuple[str, ...] | None
    per_block: float
    again: tuple[float, float]
    attention: bool = False


# Arrays of [token, width] that live while the gradient of one block is computed, beside
# what is kept. This, and what "none" keeps, libtpu 0.0.42.1 told of SD3.5 (what a
# program needs, by the microbatch); the rest follows from the names.
IN_ONE_BLOCK = 70.0
# A block has 12 products of [token, width] with [width, width]: query, key, value, the
# output of attention, and 4 + 4 of the MLP.
POLICIES: Mapping[str, Policy] = {
    "none": Policy(None, 49.0, (0, 0)),
    # The block's input alone: a forward pass more of work, little memory.
    "full": Policy((), 1.0, (8 / 12, 1), attention=True),
    # The MLP is computed again.
    "attention": Policy(("modulation", "qkv", SAVED), 5.0, (5 / 12, 9 / 12)),
    # Only what lies between matmuls is computed again.
    "dense": Policy(("modulation", "qkv", SAVED, "hidden", "out"), 11.0, (0, 0)),
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
