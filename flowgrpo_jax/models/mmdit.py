"""The multimodal diffusion transformer of the SD3 family (Esser et al. 2024).

Image and text tokens keep their own weights and share one attention; time and pooled
text modulate every block (adaLN). The class covers SD3, SD3.5 and the embedded model
by its config; parameter names follow diffusers' `SD3Transformer2DModel` where one
tensor maps to one (query, key and value are fused here).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flowgrpo_jax.models.layers import Dense, LayerNorm, RMSNorm, attention


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Fields of diffusers' transformer/config.json, plus the LoRA of the policy."""

    sample_size: int = 128  # latent pixels at the training resolution
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192  # patches along one side of the positional table
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None  # None or "rms_norm"
    mlp_ratio: int = 4
    lora_rank: int = 0
    lora_alpha: float = 0.0
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads


class MMDiT(nn.Module):
    """Velocity (or clean sample) of noisy latents under text, as the weights define."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        context: Float[Array, "sample token feature"],
        pooled: Float[Array, "sample pooled"],
    ) -> Float[Array, "sample height width out_channel"]:
        cfg = self.config
        rows, columns = (side // cfg.patch_size for side in latents.shape[1:3])
        image = _Patchify(cfg, name="pos_embed")(latents)
        condition = _TimeText(cfg, name="time_text_embed")(sigma, pooled)
        condition = nn.silu(condition)
        text = Dense(cfg.width, dtype=cfg.dtype, name="context_embedder")(context)

        # Blocks of one kind are one scanned layer: compile time does not grow with
        # depth. SD3.5-medium is 13 dual blocks, 10 plain ones and the last.
        dual = len(cfg.dual_attention_layers)
        if cfg.dual_attention_layers != tuple(range(dual)):
            raise ValueError(
                f"dual_attention_layers: {cfg.dual_attention_layers}: only a prefix "
                "of the blocks may be dual"
            )
        plain = cfg.num_layers - 1 - dual
        for name, depth, is_dual in (
            ("dual_blocks", dual, True),
            ("blocks", plain, False),
        ):
            if depth:
                stack = nn.scan(
                    _ScanBlock,
                    variable_axes={"params": 0, "lora": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,
                    length=depth,
                )
                (image, text), _ = stack(cfg, is_dual, name=name)(
                    (image, text), condition
                )
        image, _ = _Block(cfg, dual=False, last=True, name="last_block")(
            image, text, condition
        )
        scale, shift = _modulation(cfg, 2, "norm_out")(condition)
        image = LayerNorm()(image) * (1 + scale) + shift
        image = Dense(
            cfg.patch_size**2 * cfg.out_channels,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="proj_out",
        )(image)
        return unpatchify(image, rows, columns, cfg.patch_size)


class _ScanBlock(nn.Module):
    """A block in the (carry, output) form that `nn.scan` asks for."""

    config: MMDiTConfig
    dual: bool

    @nn.compact
    def __call__(self, streams, condition):
        block = _Block(self.config, dual=self.dual, last=False, name="block")
        return block(*streams, condition), None


class _Block(nn.Module):
    """One joint block; the last one uses the text but does not return it."""

    config: MMDiTConfig
    dual: bool
    last: bool

    @nn.compact
    def __call__(self, image, text, condition):
        cfg = self.config
        changes = _modulation(cfg, 9 if self.dual else 6, "norm1")(condition)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = changes[:6]
        normed = LayerNorm()(image)
        image_in = normed * (1 + scale) + shift
        if self.last:
            text_scale, text_shift = _modulation(cfg, 2, "norm1_context")(condition)
        else:
            text_changes = _modulation(cfg, 6, "norm1_context")(condition)
            text_shift, text_scale = text_changes[:2]
        text_in = LayerNorm()(text) * (1 + text_scale) + text_shift

        image_out, text_out = _JointAttention(cfg, self.last, name="attn")(
            image_in, text_in
        )
        image = image + gate * image_out
        if self.dual:
            dual_shift, dual_scale, dual_gate = changes[6:]
            dual_in = normed * (1 + dual_scale) + dual_shift
            image = image + dual_gate * _SelfAttention(cfg, name="attn2")(dual_in)
        mlp_in = LayerNorm()(image) * (1 + mlp_scale) + mlp_shift
        image = image + mlp_gate * _FeedForward(cfg, name="ff")(mlp_in)
        if self.last:
            return image, text

        text_gate, mlp_shift, mlp_scale, mlp_gate = text_changes[2:]
        text = text + text_gate * text_out
        mlp_in = LayerNorm()(text) * (1 + mlp_scale) + mlp_shift
        text = text + mlp_gate * _FeedForward(cfg, name="ff_context")(mlp_in)
        return image, text


class _JointAttention(nn.Module):
    """Image and text tokens with projections of their own in one attention."""

    config: MMDiTConfig
    last: bool

    @nn.compact
    def __call__(self, image, text):
        cfg = self.config
        tokens = image.shape[1]
        streams = [
            _query_key_value(cfg, image, "", lora=True),
            _query_key_value(cfg, text, "add_", lora=True),
        ]
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(*streams, strict=True)]
        mixed = attention(*joined)
        image_out = _projection(cfg, "to_out", lora=True)(mixed[:, :tokens])
        if self.last:
            return image_out, None
        return image_out, _projection(cfg, "to_add_out", lora=True)(mixed[:, tokens:])


class _SelfAttention(nn.Module):
    """The second attention of a dual block (SD3.5-medium): image tokens only.

    Flow-GRPO's LoRA does not adapt it (its target names match `attn.` alone).
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(self, image):
        mixed = attention(*_query_key_value(self.config, image, "", lora=False))
        return _projection(self.config, "to_out", lora=False)(mixed)


def _query_key_value(cfg: MMDiTConfig, tokens, prefix: str, lora: bool):
    """Fused projections of one stream, as heads, query and key normalised."""
    fused = _projection(cfg, f"{prefix}qkv", lora, parts=3)(tokens)
    shape = (*tokens.shape[:2], 3, cfg.num_attention_heads, cfg.attention_head_dim)
    query, key, value = jnp.moveaxis(fused.reshape(shape), 2, 0)
    if cfg.qk_norm == "rms_norm":
        query = RMSNorm(name=f"{prefix}norm_q")(query)
        key = RMSNorm(name=f"{prefix}norm_k")(key)
    return query, key, value


def _projection(cfg: MMDiTConfig, name: str, lora: bool, parts: int = 1) -> Dense:
    return Dense(
        cfg.width * parts,
        parts=parts,
        lora_rank=cfg.lora_rank if lora else 0,
        lora_alpha=cfg.lora_alpha,
        dtype=cfg.dtype,
        name=name,
    )


class _FeedForward(nn.Module):
    config: MMDiTConfig

    @nn.compact
    def __call__(self, tokens):
        cfg = self.config
        hidden = Dense(cfg.mlp_ratio * cfg.width, dtype=cfg.dtype, name="proj")(tokens)
        hidden = nn.gelu(hidden, approximate=True)
        return Dense(cfg.width, dtype=cfg.dtype, name="out")(hidden)


def _modulation(cfg: MMDiTConfig, changes: int, name: str):
    """adaLN: `changes` vectors [sample, 1, width] from the activated condition.

    Zero at the start of pretraining, so that every block begins as the identity.
    """
    layer = Dense(
        changes * cfg.width,
        dtype=cfg.dtype,
        kernel_init=nn.initializers.zeros,
        name=name,
    )
    return lambda condition: jnp.split(layer(condition)[:, None], changes, axis=-1)


class _Patchify(nn.Module):
    """Patches to tokens (a strided convolution written as a matmul), plus position."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, latents):
        cfg = self.config
        patch = cfg.patch_size
        samples, height, width, channels = latents.shape
        rows, columns = height // patch, width // patch
        patches = latents.reshape(samples, rows, patch, columns, patch, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(samples, rows * columns, patch * patch * channels)
        table = position_table(
            cfg.width, cfg.pos_embed_max_size, cfg.sample_size // patch, rows, columns
        )
        tokens = Dense(cfg.width, dtype=cfg.dtype, name="proj")(patches)
        return tokens + jnp.asarray(table, cfg.dtype)


class _TimeText(nn.Module):
    """Condition vector: embedded timestep plus embedded pooled text."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, sigma, pooled):
        cfg = self.config
        time = timestep_embedding(1000.0 * sigma).astype(cfg.dtype)
        parts = []
        for name, vector in (("timestep", time), ("text", pooled)):
            hidden = Dense(cfg.width, dtype=cfg.dtype, name=f"{name}_1")(vector)
            hidden = nn.silu(hidden)
            parts.append(Dense(cfg.width, dtype=cfg.dtype, name=f"{name}_2")(hidden))
        return parts[0] + parts[1]


def timestep_embedding(
    timestep: Float[Array, " sample"], features: int = 256
) -> Float[Array, "sample feature"]:
    """Cosines then sines of timestep * 10000^(-i/half), in fp32."""
    half = features // 2
    frequency = jnp.exp(-np.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timestep.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_table(
    width: int, max_size: int, base_size: int, rows: int, columns: int
) -> Float[np.ndarray, "token width"]:
    """Sine-cosine table [rows * columns, width]: the centre crop of the full table.

    Coordinates are scaled so that `base_size` patches span `base_size` units of the
    `max_size` grid, as in diffusers' `PatchEmbed`.
    """
    if rows > max_size or columns > max_size:
        raise ValueError(
            f"latents of {rows}x{columns} patches exceed pos_embed_max_size={max_size}"
        )
    place = np.arange(max_size, dtype=np.float64) * base_size / max_size
    frequency = 10_000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    angle = place[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    # The column coordinate fills the first half of the features.
    table = np.concatenate(
        np.broadcast_arrays(
            axis[None, left : left + columns], axis[top : top + rows, None]
        ),
        axis=-1,
    )
    return table.reshape(rows * columns, width).astype(np.float32)


def unpatchify(
    tokens: Float[Array, "sample token feature"], rows: int, columns: int, patch: int
) -> Float[Array, "sample height width channel"]:
    """Tokens of patch * patch * channel features back to a picture."""
    samples = tokens.shape[0]
    grid = tokens.reshape(samples, rows, columns, patch, patch, -1)
    grid = grid.transpose(0, 1, 3, 2, 4, 5)
    return jax.lax.reshape(
        grid, (samples, rows * patch, columns * patch, grid.shape[-1])
    )
