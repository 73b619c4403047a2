"""Counts of floating-point operations: 2 per multiply-add of matrix products."""

from collections.abc import Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """Operations of one image through a transformer, forward."""

    linear: float
    attention: float  # the two products of scores and values

    @property
    def total(self) -> float:
        return self.linear + self.attention


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
