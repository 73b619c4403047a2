"""What networks cost, by formula: floating-point operations, bytes, seconds.

An operation count is 2 per multiply-add, per image and pass, of matrix products and
convolutions alone: no rematerialisation, no LoRA, no padding. XLA's own count takes
the body of a scan once, and 2 * parameters * tokens counts adaLN's matrices, a third
of the parameters, as if every token went through them: neither is used.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from flowgrpo_jax.models.sd3.transformer import MMDiTConfig

GB = 1e9
TERA = 1e12


class Chip(NamedTuple):
    """Published figures of a device: dense bf16 operations per second, bytes.

    Of TPUs by docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}: a TPU7x chip (2,307
    TFLOP/s, 192 GiB) is two devices, of the other kinds it is one.
    """

    rate: float
    memory: float
    matrix_unit: int | None = None  # a TPU's: lanes that one head's features can fill


CHIPS = {
    "v5e": Chip(197 * TERA, 16 * GB, 128),
    "v5p": Chip(459 * TERA, 95 * GB, 128),
    "v6e": Chip(918 * TERA, 32 * GB, 256),
    "tpu7x": Chip(2307 / 2 * TERA, 96 * GB, 256),
    "H100": Chip(989 * TERA, 80 * GB),
    "H200": Chip(989 * TERA, 141 * GB),
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
# What a block keeps for its backward pass, in arrays of [token, width], by the remat
# policies of models/sd3/transformer_config.py: its input, and of matmuls what the policy names.
KEPT_PER_BLOCK = {"full": 1.0, "attention": 5.0, "dense": 9.0, "none": 24.0}


def chip_name(device_kind: str) -> str | None:
    """The row of CHIPS of a device that names itself so; None if there is none."""
    gpu = next((name for name in CHIPS if f"NVIDIA {name}" in device_kind), None)
    return _KINDS.get(device_kind, gpu)


class Pass(NamedTuple):
    """Operations of one image through the transformer, forward."""

    linear: float
    attention: float  # the two products of scores and values

    @property
    def total(self) -> float:
        return self.linear + self.attention


def transformer_pass(config: MMDiTConfig, image_tokens: int, text_tokens: int) -> Pass:
    """One forward pass of one image. The last block makes no text.

    Within 0.1% of torch's count over diffusers' network (tests/parity/test_cost.py).
    """
    width, layers = config.width, config.num_layers
    dual = len(config.dual_attention_layers)
    square = 2.0 * width**2  # one width x width matrix on one token
    joint = 4 + 2 * config.mlp_ratio  # qkv, out and the two of the MLP
    patch = config.patch_size**2 * (config.in_channels + config.out_channels)
    on_image = square * (layers * joint + dual * 4) + 2 * width * patch
    on_text = square * ((layers - 1) * joint + 3)
    on_text += 2 * width * config.joint_attention_dim
    modulation = square * (layers * 6 + dual * 3 + (layers - 1) * 6 + 2 + 2)
    condition = 2 * width * (256 + config.pooled_projection_dim) + 2 * square
    both = image_tokens + text_tokens
    return Pass(
        image_tokens * on_image + text_tokens * on_text + modulation + condition,
        4.0 * width * (layers * both**2 + dual * image_tokens**2),
    )


def vae_decode(
    rows: int,
    columns: int,
    *,
    latent_channels: int,
    widths: Sequence[int],
    layers: int,
    channels: int = 3,
) -> float:
    """Operations of `AutoencoderKL`'s decoder from latents of `rows` x `columns`.

    `widths` and `layers` are its block_out_channels and layers_per_block.
    """

    def conv(inputs, outputs, size=3):
        return 2.0 * size**2 * inputs * outputs

    def resnet(inputs, outputs):
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    pixels, width = rows * columns, widths[-1]
    total = pixels * (conv(latent_channels, width) + 2 * resnet(width, width))
    total += pixels * (4 * conv(width, width, 1) + 4 * pixels * width)  # attention
    for level, outputs in enumerate(reversed(widths)):
        total += pixels * (resnet(width, outputs) + layers * resnet(outputs, outputs))
        width = outputs
        if level + 1 < len(widths):
            pixels *= 4
            total += pixels * conv(width, width)
    return total + pixels * conv(width, channels)


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


def saved_activations(
    config: MMDiTConfig, tokens: int, per_block: float = 1.0
) -> float:
    """Bytes that one image's pass keeps for its backward.

    `per_block`: arrays of [token, width] that a block keeps, see KEPT_PER_BLOCK.
    """
    item = jax.numpy.dtype(config.dtype).itemsize
    return 1.0 * config.num_layers * per_block * tokens * config.width * item


def parameters(tree: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> int:
    """Bytes that a device holds of placed arrays, or of shapes with a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
