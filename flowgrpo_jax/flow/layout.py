"""Where every sample of an iteration stands: update chunk, microbatch, slot, sibling.

A slot is one state that goes through the network. The siblings in it are samples that
share this state; plans without sharing have one sibling per slot. The order is
prompts, then members of the group. Chunks hold whole groups (each chunk is one
optimizer step), microbatches are of one fixed number of slots, and the number of
microbatches of a chunk is padded to a multiple of the devices. Padding has mask 0.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from flowgrpo_jax.errors import UserError


class Layout(NamedTuple):
    """Index tables; padding repeats slot 0 with mask 0."""

    prompt: Int32[Array | np.ndarray, "update batch slot"]
    member: Int32[Array | np.ndarray, "update batch slot sibling"]
    mask: Float32[Array | np.ndarray, "update batch slot"]


def group_layout(
    num_prompts: int,
    group_size: int,
    updates: int,
    microbatch: int,
    devices: int,
    siblings: int = 1,
) -> Layout:
    """Layout of an iteration: `group_size` members of every prompt, in order.

    `updates` must divide `num_prompts`, so that chunks hold whole groups; `siblings`
    (members that share a slot) must divide `group_size`.
    """
    if num_prompts % updates:
        raise UserError(
            f"updates_per_iteration: {updates}: must divide the "
            f"prompts_per_iteration ({num_prompts})"
        )
    prompt, member = np.divmod(np.arange(num_prompts * group_size), group_size)
    return layout_of(
        prompt[::siblings],
        member.reshape(-1, siblings),
        updates,
        microbatch,
        devices,
    )


def layout_of(
    prompt: Int[np.ndarray, " slot"],
    member: Int[np.ndarray, "slot sibling"],
    updates: int,
    microbatch: int,
    devices: int,
) -> Layout:
    """Layout of any list of slots, cut into `updates` equal chunks."""
    per_update = len(prompt) // updates
    batches = -(-per_update // microbatch)
    batches = -(-batches // devices) * devices

    def table(values, dtype):
        values = np.asarray(values, dtype)
        rest = values.shape[1:]
        flat = np.zeros((updates, batches * microbatch, *rest), dtype)
        flat[:, :per_update] = values.reshape(updates, per_update, *rest)
        return flat.reshape(updates, batches, microbatch, *rest)

    return Layout(
        prompt=table(prompt, np.int32),
        member=table(member, np.int32),
        mask=table(np.ones(len(prompt)), np.float32),
    )


def collect(values: np.ndarray, layout: Layout) -> np.ndarray:
    """[update, batch, slot, sibling, ...] to [sample, ...]: prompts, then members."""
    slots = values[np.asarray(layout.mask) > 0]
    return slots.reshape(-1, *slots.shape[2:])


def distribute(values: np.ndarray, layout: Layout) -> np.ndarray:
    """[sample, ...] to [update, batch, slot, sibling, ...]; zeros at padding."""
    siblings = layout.member.shape[-1]
    out = np.zeros((*layout.member.shape, *values.shape[1:]), values.dtype)
    out[np.asarray(layout.mask) > 0] = values.reshape(-1, siblings, *values.shape[1:])
    return out
