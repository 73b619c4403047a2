"""What networks cost, by formula: floating-point operations, bytes, seconds.

An operation count is 2 per multiply-add, per image and pass, of matrix products and
convolutions alone: no rematerialisation, no LoRA, no padding. XLA's own count takes
the body of a scan once, and 2 * parameters * tokens counts adaLN's matrices, a third
of the parameters, as if every token went through them: neither is used.
"""

import math
from typing import Any, NamedTuple

import jax

from flowgrpo_jax.models.operations import Pass

GB = 1e9
TERA = 1e12


class Chip(NamedTuple):
    """Published figures of a device: dense bf16 operations per second, bytes.

    `bandwidth`: bytes per second of its memory. Of TPUs by
    docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}: a TPU7x chip (2,307 TFLOP/s, 192
    GiB, 7,380 GB/s) is two devices, of the other kinds it is one.
    """

    rate: float
    memory: float
    bandwidth: float
    matrix_unit: int | None = None  # a TPU's: lanes that one head's features can fill


CHIPS = {
    "v5e": Chip(197 * TERA, 16 * GB, 819 * GB, 128),
    "v5p": Chip(459 * TERA, 95 * GB, 2765 * GB, 128),
    "v6e": Chip(918 * TERA, 32 * GB, 1638 * GB, 256),
    "tpu7x": Chip(2307 / 2 * TERA, 96 * GB, 7380 / 2 * GB, 256),
    "H100": Chip(989 * TERA, 80 * GB, 3350 * GB),
    "H200": Chip(989 * TERA, 141 * GB, 4800 * GB),
}
# How devices name themselves.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_name(device_kind: str) -> str | None:
    """The row of CHIPS of a device that names itself so; None if there is none."""
    gpu = next((name for name in CHIPS if f"NVIDIA {name}" in device_kind), None)
    return _KINDS.get(device_kind, gpu)


def trained_pass(
    forward: Pass, *, lora: bool, references: int = 0, remat: bool = False
) -> float:
    """Forward and backward of the learner and forward passes of fixed policies.

    Frozen weights get no gradient: backward costs them one product in place of two.
    Flash attention computes its scores again: 2.5 times its forward. `remat` adds the
    forward that is run again.
    """
    backward = forward.linear * (1 if lora else 2) + 2.5 * forward.attention
    return forward.total * (1 + references + remat) + backward


def seconds(operations: float, chip: Chip, chips: int = 1) -> float:
    """At the chip's full rate: no run is faster."""
    return operations / (chip.rate * chips)


def head_factor(forward: Pass, chip: Chip, head_dim: int) -> float:
    """How much longer a forward pass takes for heads that leave lanes unused."""
    if chip.matrix_unit is None:
        return 1.0
    idle = max(1.0, chip.matrix_unit / head_dim)
    return (forward.linear + forward.attention * idle) / forward.total


def parameters(tree: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> int:
    """Bytes that a device holds of placed arrays, or of shapes with a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
