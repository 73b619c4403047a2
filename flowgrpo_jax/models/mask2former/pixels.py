"""Mask2Former's pixel decoder: features of several scales that know each other.

Tokens of the three coarse scales attend to a few learned places of all three
(deformable attention, Zhu et al. 2021, arXiv 2010.04159); the finest scale is added
by a pyramid step and gives the pixel embeddings that masks are read from.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former.swin import layer_norm

LEVELS = 3  # scales that attend
POINTS = 4  # places that a head looks at in one scale
GROUPS = 32  # of the group norms

Map = Float[Array, "image _ _ _"]  # image, height, width, channel
Size = tuple[int, ...]  # height, width


class PixelDecoder(nn.Module):
    """Four feature maps, fine to coarse, to (pixel embeddings, maps coarse to fine)."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, features: Sequence[Map]) -> tuple[Map, list[Map]]:
        cfg = self.config
        coarse = [
            _project(cfg, f"input{level}")(feature)
            for level, feature in enumerate(features[:0:-1])
        ]
        sizes = [feature.shape[1:3] for feature in coarse]
        level_embed = self.param(
            "level_embed", nn.initializers.normal(1.0), (LEVELS, cfg.feature_size)
        )
        place = jnp.concatenate(
            [
                sine_position(size, cfg.feature_size).reshape(-1, cfg.feature_size)
                + level_embed[level]
                for level, size in enumerate(sizes)
            ]
        )
        tokens = jnp.concatenate([flatten(feature) for feature in coarse], axis=1)
        for layer in range(cfg.encoder_layers):
            tokens = _Layer(cfg, tuple(sizes), name=f"layer{layer}")(tokens, place)
        maps = [
            part.reshape(-1, *size, cfg.feature_size)
            for part, size in zip(split(tokens, sizes), sizes, strict=True)
        ]
        lateral = _project(cfg, "lateral", use_bias=False)(features[0])
        fine = lateral + resize(maps[-1], lateral.shape[1:3])
        fine = nn.Conv(
            cfg.feature_size, (3, 3), use_bias=False, dtype=cfg.dtype, name="smooth"
        )(fine)
        fine = nn.relu(_group_norm(cfg, "smooth_norm")(fine))
        embeddings = nn.Dense(
            cfg.mask_feature_size, dtype=cfg.dtype, name="mask_projection"
        )(fine)
        return embeddings, maps


def _project(cfg, name: str, use_bias: bool = True):
    """To the decoder's width, pixel by pixel, and a group norm."""
    dense = nn.Dense(cfg.feature_size, use_bias=use_bias, dtype=cfg.dtype, name=name)
    return lambda x: _group_norm(cfg, f"{name}_norm")(dense(x))


def _group_norm(cfg, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=cfg.dtype, name=name
    )


class _Layer(nn.Module):
    """Deformable self-attention of all scales, then an MLP; norms come after."""

    config: Mask2FormerConfig
    sizes: tuple[Size, ...]

    @nn.compact
    def __call__(self, tokens, place):
        cfg = self.config
        mixed = _DeformableAttention(cfg, self.sizes, name="attention")(tokens, place)
        tokens = layer_norm("norm1", cfg)(tokens + mixed)
        hidden = nn.Dense(cfg.encoder_feedforward_dim, dtype=cfg.dtype, name="mlp_in")(
            tokens
        )
        hidden = nn.Dense(cfg.feature_size, dtype=cfg.dtype, name="mlp_out")(
            nn.relu(hidden)
        )
        return layer_norm("norm2", cfg)(tokens + hidden)


class _DeformableAttention(nn.Module):
    """Every token reads a few places around its own, in every scale."""

    config: Mask2FormerConfig
    sizes: tuple[Size, ...]

    @nn.compact
    def __call__(self, tokens, place):
        cfg = self.config
        heads = cfg.num_attention_heads
        shape = (*tokens.shape[:2], heads, LEVELS, POINTS)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=cfg.dtype, name=name)

        query = tokens + place
        reach = dense(heads * LEVELS * POINTS * 2, "sampling_offsets")(query)
        # Offsets count pixels of the scale that is looked at, (x, y).
        unit = np.array([(width, height) for height, width in self.sizes])
        offset = reach.reshape(*shape, 2) / unit[:, None]
        places = reference_points(self.sizes)[:, None, None, None] + offset
        weights = dense(heads * LEVELS * POINTS, "attention_weights")(query)
        weights = weights.astype(jnp.float32).reshape(*shape[:3], -1)
        weights = jax.nn.softmax(weights, axis=-1).reshape(shape)
        values = dense(cfg.feature_size, "value_proj")(tokens)
        values = values.reshape(*tokens.shape[:2], heads, -1)
        mixed = deformable_attention(values, self.sizes, places, weights)
        return dense(cfg.feature_size, "output_proj")(mixed)


def deformable_attention(
    values: Float[Array, "image token head depth"],
    sizes: Sequence[Size],
    places: Float[Array, "image query head level point 2"],
    weights: Float[Array, "image query head level point"],
) -> Float[Array, "image query feature"]:
    """Weighted sum of bilinear samples; `places` are (x, y) in [0, 1] of each scale.

    Pixels lie at half-integers of the grid and are zero beyond it. The bilinear
    weight of a pixel is a product of two hats, so the samples of a head are one row
    of an attention matrix over the pixels. A TPU's compiler makes that matrix inside
    the product with the values and never writes it to memory; gathering the samples
    would read a dozen values of every head one by one.
    """
    places, weights = jnp.moveaxis(places, 1, 2), jnp.moveaxis(weights, 1, 2)
    total = jnp.zeros((), values.dtype)
    for level, (height, width) in enumerate(sizes):
        row, column = np.divmod(np.arange(height * width), width)
        x, y = jnp.moveaxis(places[:, :, :, level], -1, 0)
        matrix = jnp.zeros((), jnp.float32)
        for point in range(weights.shape[-1]):
            matrix += (
                weights[:, :, :, level, point, None]
                * _hat(y[..., point] * height - 0.5, row)
                * _hat(x[..., point] * width - 0.5, column)
            )
        pixels = split(values, sizes)[level]
        total += jnp.einsum("naqk,nkad->nqad", matrix.astype(values.dtype), pixels)
    return total.reshape(*total.shape[:2], -1)


def _hat(
    place: Float[Array, "*query"], pixel: Int[np.ndarray, " pixel"]
) -> Float[Array, "*query pixel"]:
    """Weights of linear interpolation: 1 at the pixel, 0 one pixel away."""
    return jnp.maximum(1 - jnp.abs(place[..., None] - pixel.astype(np.float32)), 0)


def reference_points(sizes: Sequence[Size]) -> Float[np.ndarray, "query 2"]:
    """Where each token is, (x, y) in [0, 1], scale after scale."""
    points = []
    for height, width in sizes:
        y, x = np.meshgrid(
            (np.arange(height) + 0.5) / height,
            (np.arange(width) + 0.5) / width,
            indexing="ij",
        )
        points.append(np.stack([x, y], axis=-1).reshape(-1, 2))
    return np.concatenate(points).astype(np.float32)


def sine_position(
    size: Size, features: int, temperature: float = 10_000.0
) -> Float[np.ndarray, "height width feature"]:
    """Sines and cosines, in turns, of the pixel's place: y first, then x."""
    (height, width), half = size, features // 2
    frequency = temperature ** (-2 * (np.arange(half) // 2) / half)

    def axis(length: int) -> np.ndarray:
        place = np.arange(1, length + 1) / (length + 1e-6) * 2 * np.pi
        angle = place[:, None] * frequency
        return np.where(np.arange(half) % 2, np.cos(angle), np.sin(angle))

    y = np.broadcast_to(axis(height)[:, None], (height, width, half))
    x = np.broadcast_to(axis(width), (height, width, half))
    return np.concatenate([y, x], axis=-1).astype(np.float32)


def flatten(x: Map) -> Float[Array, "image token channel"]:
    """A map as tokens in reading order."""
    return x.reshape(len(x), -1, x.shape[-1])


def split(tokens: Float[Array, "image token ..."], sizes: Sequence[Size]) -> list:
    """The tokens of each scale."""
    ends = np.cumsum([height * width for height, width in sizes])[:-1]
    return jnp.split(tokens, ends, axis=1)


def resize(x: Map, size: Size) -> Map:
    """Bilinear, pixels at half-integers, without antialiasing: torch's interpolate."""
    shape = (len(x), *size, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=False)
