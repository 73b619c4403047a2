"""Where every sample of an iteration stands: update chunk, microbatch, slot.

The order is prompts, then members of the group. Chunks hold whole groups (each chunk
is one optimizer step), microbatches are of one fixed size, and the number of
microbatches of a chunk is padded to a multiple of the devices. Padding has mask 0.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from flowgrpo_jax.errors import UserError


class Layout(NamedTuple):
    """Index tables; padding repeats sample 0 with mask 0."""

    prompt: Int32[Array | np.ndarray, "update batch slot"]
    member: Int32[Array | np.ndarray, "update batch slot"]
    mask: Float32[Array | np.ndarray, "update batch slot"]


def group_layout(
    num_prompts: int, group_size: int, updates: int, microbatch: int, devices: int
) -> Layout:
    """Layout of an iteration: `group_size` members of every prompt, in order.

    `updates` must divide `num_prompts`, so that chunks hold whole groups.
    """
    if num_prompts % updates:
        raise UserError(
            f"updates_per_iteration: {updates}: must divide the "
            f"prompts_per_iteration ({num_prompts})"
        )
    prompt, member = np.divmod(np.arange(num_prompts * group_size), group_size)
    return layout_of(prompt, member, updates, microbatch, devices)


def layout_of(
    prompt: Int[np.ndarray, " sample"],
    member: Int[np.ndarray, " sample"],
    updates: int,
    microbatch: int,
    devices: int,
) -> Layout:
    """Layout of any list of samples, cut into `updates` equal chunks."""
    per_update = len(prompt) // updates
    batches = -(-per_update // microbatch)
    batches = -(-batches // devices) * devices

    def table(values, dtype):
        flat = np.zeros((updates, batches * microbatch), dtype)
        flat[:, :per_update] = np.reshape(values, (updates, per_update))
        return flat.reshape(updates, batches, microbatch)

    return Layout(
        prompt=table(prompt, np.int32),
        member=table(member, np.int32),
        mask=table(np.ones(len(prompt)), np.float32),
    )


def collect(values: np.ndarray, layout: Layout) -> np.ndarray:
    """[update, batch, slot, ...] to [sample, ...] in the order of prompts, members."""
    return values[np.asarray(layout.mask) > 0]


def distribute(values: np.ndarray, layout: Layout) -> np.ndarray:
    """[sample, ...] to [update, batch, slot, ...]; zeros at padding."""
    mask = np.asarray(layout.mask)
    out = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    out[mask > 0] = values
    return out
