"""Swin transformer backbone (Liu et al. 2021, arXiv 2103.14030).

Attention stays within square windows that shift by half a window in every second
block; four stages, each at half the resolution of the one before. It computes what
transformers' `SwinBackbone` does: the four feature maps, each with a norm of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.tensors import Rule

SEPARATED = -100.0  # added to logits between pixels that are no neighbours

_HARMLESS = (  # of classification and pretraining, or told by the keys that are read
    *config_json.BOOKKEEPING,
    *("image_size", "num_channels", "encoder_stride", "num_layers", "hidden_size"),
    *("stage_names", "out_indices", "path_norm"),
)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Fields of transformers' Swin config.json."""

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SwinConfig":
        """From the keys of config.json; UserError for what is not implemented."""
        depths = values.get("depths", cls.depths)
        stages = len(depths) if isinstance(depths, list | tuple) else 0
        supported: dict[str, list[Any]] = {
            "model_type": ["swin"],
            "use_absolute_embeddings": [False],
            "qkv_bias": [True],
            "hidden_act": ["gelu"],
            "out_features": [[f"stage{i + 1}" for i in range(stages)]],
        }
        where = "model: Swin's config"
        return config_json.build(cls, values, supported, where, _HARMLESS)


class Swin(nn.Module):
    """Images to one feature map per stage, at strides patch_size * (1, 2, 4, 8)."""

    config: SwinConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "image height width 3"]
    ) -> tuple[Float[Array, "image _ _ _"], ...]:
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(
            cfg.embed_dim, patch, patch, "VALID", dtype=cfg.dtype, name="patches"
        )(pad_to_multiple(pixels, cfg.patch_size))
        x = layer_norm("patches_norm", cfg)(x)
        maps = []
        for stage, depth in enumerate(cfg.depths):
            if stage:
                x = _Merge(cfg, name=f"merge{stage - 1}")(x)
            for block in range(depth):
                shift = cfg.window_size // 2 if block % 2 else 0
                x = _Block(
                    cfg, cfg.num_heads[stage], shift, name=f"stage{stage}_block{block}"
                )(x)
            maps.append(layer_norm(f"output{stage + 1}_norm", cfg)(x))
        return tuple(maps)


class _Merge(nn.Module):
    """Halves the resolution: the four pixels of a square become one."""

    config: SwinConfig

    @nn.compact
    def __call__(self, x):
        x = pad_to_multiple(x, 2)
        square = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = layer_norm("norm", self.config)(jnp.concatenate(square, axis=-1))
        features = x.shape[-1] // 2
        return nn.Dense(
            features, use_bias=False, dtype=self.config.dtype, name="reduction"
        )(x)


class _Block(nn.Module):
    """Attention within windows, then an MLP."""

    config: SwinConfig
    heads: int
    shift: int

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        height, width, features = x.shape[1:]
        eps = cfg.layer_norm_eps
        normed = layer_norm("norm1", cfg, eps)(x)
        normed = pad_to_multiple(normed, cfg.window_size)
        padded = normed.shape[1:3]
        shifted = jnp.roll(normed, (-self.shift, -self.shift), axis=(1, 2))
        windows = partition(shifted, cfg.window_size)
        mixed = _WindowAttention(cfg, self.heads, name="attention")(
            windows, region_bias(*padded, cfg.window_size, self.shift)
        )
        mixed = unpartition(mixed, *padded)
        mixed = jnp.roll(mixed, (self.shift, self.shift), axis=(1, 2))
        x = x + mixed[:, :height, :width]
        hidden = layer_norm("norm2", cfg, eps)(x)
        hidden = nn.Dense(
            int(cfg.mlp_ratio * features), dtype=cfg.dtype, name="mlp_in"
        )(hidden)
        hidden = nn.gelu(hidden, approximate=False)
        return x + nn.Dense(features, dtype=cfg.dtype, name="mlp_out")(hidden)


class _WindowAttention(nn.Module):
    """Softmax attention over the pixels of a window, biased by relative position."""

    config: SwinConfig
    heads: int

    @nn.compact
    def __call__(self, windows, bias):
        cfg = self.config
        images, count, pixels, features = windows.shape
        fused = nn.Dense(3 * features, dtype=cfg.dtype, name="qkv")(windows)
        fused = fused.reshape(images, count, pixels, 3, self.heads, -1)
        query, key, value = jnp.moveaxis(fused, 3, 0)
        table = self.param(
            "relative_position",
            nn.initializers.zeros,
            ((2 * cfg.window_size - 1) ** 2, self.heads),
        )
        near = jnp.moveaxis(table[relative_index(cfg.window_size)], -1, 0)
        logits = jnp.einsum("nwqhd,nwkhd->nwhqk", query, key) / query.shape[-1] ** 0.5
        logits = logits.astype(jnp.float32) + near + bias[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(cfg.dtype)
        mixed = jnp.einsum("nwhqk,nwkhd->nwqhd", weights, value)
        return nn.Dense(features, dtype=cfg.dtype, name="out")(
            mixed.reshape(windows.shape)
        )


def layer_norm(name: str, config: Any, eps: float = 1e-5) -> nn.LayerNorm:
    """Torch's layer norm; statistics in fp32, result in the network's dtype."""
    return nn.LayerNorm(
        epsilon=eps, use_fast_variance=False, dtype=config.dtype, name=name
    )


def pad_to_multiple(
    x: Float[Array, "image height width channel"], divisor: int
) -> Float[Array, "image _ _ channel"]:
    """Zeros below and to the right until both sides are multiples of `divisor`."""
    rows, columns = (-side % divisor for side in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))


def partition(
    x: Float[Array, "image height width channel"], window: int
) -> Float[Array, "image window pixel channel"]:
    """Square windows in reading order, each with its pixels in reading order."""
    images, height, width, channels = x.shape
    grid = (images, height // window, window, width // window, window, channels)
    x = x.reshape(grid).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, -1, window * window, channels)


def unpartition(
    windows: Float[Array, "image window pixel channel"], height: int, width: int
) -> Float[Array, "image height width channel"]:
    """The inverse of `partition`."""
    images, _, pixels, channels = windows.shape
    side = int(pixels**0.5)
    grid = (images, height // side, width // side, side, side, channels)
    x = windows.reshape(grid).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, height, width, channels)


def relative_index(window: int) -> Int[np.ndarray, "pixel pixel"]:
    """Row of the bias table for every pair of pixels of a window."""
    place = np.stack(np.divmod(np.arange(window * window), window))
    offset = place[:, :, None] - place[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


def region_bias(
    height: int, width: int, window: int, shift: int
) -> Float[np.ndarray, "window pixel pixel"]:
    """0 between pixels of one region, `SEPARATED` between those of two.

    Rolling by `shift` brings opposite edges of the picture into one window; the last
    window of each axis therefore has two regions.
    """
    if not shift:
        return np.zeros((1, 1, 1), np.float32)
    rows, columns = (
        (np.arange(side) >= side - shift).astype(np.float32) for side in (height, width)
    )
    region = 2 * rows[:, None] + columns
    grid = (height // window, window, width // window, window)
    region = region.reshape(grid).transpose(0, 2, 1, 3).reshape(-1, window * window)
    same = region[:, :, None] == region[:, None, :]
    return np.where(same, 0.0, SEPARATED).astype(np.float32)


_BLOCK = r"stage(\d+)_block(\d+)/"
_THEIRS = r"encoder.layers.\1.blocks.\2."


def affine(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Scale and bias of a norm."""
    return (
        Rule(f"{ours}/scale", f"{theirs}.weight"),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


def dense(ours: str, theirs: str, patch: int = 0) -> tuple[Rule, ...]:
    """Kernel and bias of a linear layer, or of a convolution of `patch` pixels."""
    layout = "patch" if patch else "dense"
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", layout, patch=patch),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


_QKV = tuple(f"{_THEIRS}attention.self.{part}" for part in ("query", "key", "value"))
# Parameter path -> tensor of a transformers file (names of the hub's checkpoints).
TABLE: tuple[Rule, ...] = (
    Rule(
        "patches/kernel", "embeddings.patch_embeddings.projection.weight", layout="conv"
    ),
    Rule("patches/bias", "embeddings.patch_embeddings.projection.bias"),
    *affine("patches_norm", "embeddings.norm"),
    Rule(
        _BLOCK + "attention/qkv/kernel",
        tuple(f"{part}.weight" for part in _QKV),
        layout="dense",
    ),
    Rule(_BLOCK + "attention/qkv/bias", tuple(f"{part}.bias" for part in _QKV)),
    Rule(
        _BLOCK + "attention/relative_position",
        _THEIRS + "attention.self.relative_position_bias_table",
    ),
    *dense(_BLOCK + "attention/out", _THEIRS + "attention.output.dense"),
    *affine(_BLOCK + "norm1", _THEIRS + "layernorm_before"),
    *affine(_BLOCK + "norm2", _THEIRS + "layernorm_after"),
    *dense(_BLOCK + "mlp_in", _THEIRS + "intermediate.dense"),
    *dense(_BLOCK + "mlp_out", _THEIRS + "output.dense"),
    *affine(r"output(\d+)_norm", r"hidden_states_norms.stage\1"),
    *affine(r"merge(\d+)/norm", r"encoder.layers.\1.downsample.norm"),
    Rule(
        r"merge(\d+)/reduction/kernel",
        r"encoder.layers.\1.downsample.reduction.weight",
        layout="dense",
    ),
)
