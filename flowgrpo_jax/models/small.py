"""A denoiser of laptop size for pictures of a few hundred pixels, pixels as latents.

It is the transformer of SD3 with its own numbers: what is tried on it runs the same
code as the large models do.
"""

import dataclasses

from jax.typing import DTypeLike

from flowgrpo_jax.models.denoiser import Denoiser
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """Width of the residual stream, blocks, heads, and pixels along a patch."""

    width: int
    depth: int
    heads: int
    patch: int


def denoiser(shape: Shape, edge: int, channels: int, dtype: DTypeLike) -> Denoiser:
    """The network for pictures of at most `edge` pixels along a side.

    Text comes in the width of the residual stream.
    """
    return SD3Denoiser(
        MMDiTConfig(
            sample_size=edge,
            patch_size=shape.patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=shape.depth,
            attention_head_dim=shape.width // shape.heads,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.width,
            pooled_projection_dim=shape.width,
            pos_embed_max_size=edge // shape.patch,
            qk_norm="rms_norm",
            dtype=dtype,
        )
    )


def shape_of(network: Denoiser) -> Shape:
    """The shape that `denoiser` made this network of."""
    assert isinstance(network, SD3Denoiser)
    config = network.config
    return Shape(
        config.width, config.num_layers, config.num_attention_heads, config.patch_size
    )
