"""The transformer of FLUX.1 (Black Forest Labs, 2024): double blocks, then single ones.

In a double block image and text keep their own weights and share one attention, as in
SD3; in a single block they are one sequence, and attention and MLP run side by side.
Time, guidance and pooled text modulate every block. Parameter names follow diffusers'
`FluxTransformer2DModel` where one tensor maps to one (query, key and value are fused).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.attention import attention
from flowgrpo_jax.models.blocks import FeedForward, dense, kept_out, modulation
from flowgrpo_jax.models.flux import positions
from flowgrpo_jax.models.flux.transformer_config import PATCH, FluxConfig
from flowgrpo_jax.models.layers import LayerNorm, RMSNorm, timestep_embedding
from flowgrpo_jax.models.remat import rematerialized


class Flux(nn.Module):
    """Velocity of noisy latents under text and an embedded guidance scale."""

    config: FluxConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        context: Float[Array, "sample token feature"],
        pooled: Float[Array, "sample pooled"],
        guidance: Float[Array, " sample"] | None = None,
    ) -> Float[Array, "sample height width channel"]:
        cfg = self.config
        rows, columns = (side // PATCH for side in latents.shape[1:3])
        begin = rematerialized(_begin, cfg.remat, in_scan=False)
        image, text, condition = begin(self, latents, sigma, context, pooled, guidance)
        places = positions.tables(context.shape[1], rows, columns, cfg.axes_dims_rope)
        turn = tuple(jnp.asarray(table) for table in places)

        # One scanned layer per kind: compile time does not grow with depth.
        double = _stack(_ScanDouble, cfg, cfg.num_layers, "double_blocks")
        (image, text), _ = double((image, text), condition, turn)
        single = _stack(_ScanSingle, cfg, cfg.num_single_layers, "single_blocks")
        joined, _ = single(jnp.concatenate([text, image], axis=1), condition, turn)
        image = joined[:, context.shape[1] :]
        image = rematerialized(_finish, cfg.remat, in_scan=False)(
            self, image, condition
        )
        return unpack(image, rows, columns)


def _stack(block: Any, cfg: FluxConfig, depth: int, name: str) -> Any:
    scanned = nn.scan(
        rematerialized(block, cfg.remat, in_scan=True),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=depth,
    )
    return scanned(cfg, name=name)


def _begin(network: Flux, latents, sigma, context, pooled, guidance):
    """Tokens of image and text, and the activated condition, for the blocks."""
    cfg = network.config
    image = dense(cfg, "x_embedder", cfg.width)(pack(latents))
    text = dense(cfg, "context_embedder", cfg.width)(context)
    condition = _Condition(cfg, name="time_text_embed")(sigma, pooled, guidance)
    return image, text, nn.silu(condition)


def _finish(network: Flux, image: Array, condition: Array) -> Array:
    """What follows the blocks."""
    cfg = network.config
    scale, shift = modulation(cfg, 2, "norm_out")(condition)
    image = LayerNorm()(image) * (1 + scale) + shift
    zeros = nn.initializers.zeros
    return dense(cfg, "proj_out", cfg.out_channels, kernel_init=zeros)(image)


class _ScanDouble(nn.Module):
    """A double block in the (carry, output) form that `nn.scan` asks for."""

    config: FluxConfig

    @nn.compact
    def __call__(self, streams, condition, turn):
        return _Double(self.config, name="block")(*streams, condition, turn), None


class _ScanSingle(nn.Module):
    config: FluxConfig

    @nn.compact
    def __call__(self, joined, condition, turn):
        return _Single(self.config, name="block")(joined, condition, turn), None


class _Double(nn.Module):
    """Image and text with weights of their own in one attention."""

    config: FluxConfig

    @nn.compact
    def __call__(self, image, text, condition, turn):
        cfg = self.config
        image_changes = modulation(cfg, 6, "double/norm1")(condition)
        text_changes = modulation(cfg, 6, "double/norm1_context")(condition)
        image_out, text_out = _JointAttention(cfg, name="attn")(
            _modulated(image, *image_changes[:2]),
            _modulated(text, *text_changes[:2]),
            turn,
        )
        image = image + image_changes[2] * image_out
        text = text + text_changes[2] * text_out
        image = image + image_changes[5] * FeedForward(cfg, "double/", name="ff")(
            _modulated(image, *image_changes[3:5])
        )
        text = text + text_changes[5] * FeedForward(cfg, "double/", name="ff_context")(
            _modulated(text, *text_changes[3:5])
        )
        return image, text


class _Single(nn.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    config: FluxConfig

    @nn.compact
    def __call__(self, joined, condition, turn):
        cfg = self.config
        shift, scale, gate = modulation(cfg, 3, "single/norm")(condition)
        normed = _modulated(joined, shift, scale)
        hidden = dense(cfg, "single/proj_mlp", cfg.mlp_ratio * cfg.width)(normed)
        hidden = checkpoint_name(hidden, "hidden")
        mixed = _SelfAttention(cfg, name="attn")(normed, turn)
        both = jnp.concatenate([mixed, nn.gelu(hidden, approximate=True)], axis=-1)
        out = kept_out(dense(cfg, "single/proj_out", cfg.width)(both))
        return joined + gate * out


class _JointAttention(nn.Module):
    config: FluxConfig

    @nn.compact
    def __call__(self, image, text, turn):
        cfg = self.config
        tokens = text.shape[1]
        streams = [
            _query_key_value(cfg, text, "double/attn/add_"),
            _query_key_value(cfg, image, "double/attn/"),
        ]
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(*streams, strict=True)]
        mixed = _attend(cfg, joined, turn)
        image_out = dense(cfg, "double/attn/to_out", cfg.width)(mixed[:, tokens:])
        text_out = dense(cfg, "double/attn/to_add_out", cfg.width)(mixed[:, :tokens])
        return kept_out(image_out), kept_out(text_out)


class _SelfAttention(nn.Module):
    """Of a single block: its output is projected together with the MLP's."""

    config: FluxConfig

    @nn.compact
    def __call__(self, joined, turn):
        heads = _query_key_value(self.config, joined, "single/attn/")
        return _attend(self.config, heads, turn)


def _attend(cfg: FluxConfig, heads, turn) -> Array:
    query, key, value = heads
    query, key = positions.rotate(query, *turn), positions.rotate(key, *turn)
    return attention(query, key, value, kind=cfg.attention)


def _query_key_value(cfg: FluxConfig, tokens, prefix: str) -> list[Array]:
    """Fused projections of one stream, as heads, query and key normalised.

    What `remat` keeps of them is the product itself, from which the gradient of the
    norms asks for no second one.
    """
    fused = dense(cfg, f"{prefix}qkv", 3 * cfg.width, parts=3)(tokens)
    fused = checkpoint_name(fused, "qkv")
    inside = prefix.rpartition("/")[2]
    shape = (*tokens.shape[:2], 3, cfg.num_attention_heads, cfg.attention_head_dim)
    query, key, value = jnp.moveaxis(fused.reshape(shape), 2, 0)
    query = RMSNorm(name=f"{inside}norm_q")(query)
    key = RMSNorm(name=f"{inside}norm_k")(key)
    return [query, key, value]


def _modulated(tokens, shift, scale):
    return LayerNorm()(tokens) * (1 + scale) + shift


class _Condition(nn.Module):
    """Embedded timestep, guidance where the network has it, and pooled text, summed.

    Time and guidance are turned into features in fp32, whatever the network's type:
    in bf16 neighbouring steps of a long schedule would be one.
    """

    config: FluxConfig

    @nn.compact
    def __call__(self, sigma, pooled, guidance):
        cfg = self.config
        time = timestep_embedding(1000.0 * sigma).astype(cfg.dtype)
        parts = [("timestep", time)]
        if cfg.guidance_embeds:
            if guidance is None:
                raise UserError("guidance_scale: missing: this network reads one")
            scale = timestep_embedding(1000.0 * guidance).astype(cfg.dtype)
            parts.append(("guidance", scale))
        parts.append(("text", pooled))
        embedded = []
        for name, vector in parts:
            layer = f"time_text_embed/{name}"
            hidden = nn.silu(dense(cfg, f"{layer}_1", cfg.width)(vector))
            embedded.append(dense(cfg, f"{layer}_2", cfg.width)(hidden))
        total = embedded[0]
        for part in embedded[1:]:
            total = total + part
        return total


def pack(
    latents: Float[Array, "sample height width channel"],
) -> Float[Array, "sample token feature"]:
    """PATCH x PATCH pixels to a token, its features in the order channel, row, column.

    UserError for sides that are no multiples of PATCH.
    """
    samples, height, width, channels = latents.shape
    if height % PATCH or width % PATCH:
        raise UserError(f"latents: {height}x{width}: must be multiples of {PATCH}")
    grid = latents.reshape(
        samples, height // PATCH, PATCH, width // PATCH, PATCH, channels
    )
    return grid.transpose(0, 1, 3, 5, 2, 4).reshape(
        samples, height * width // PATCH**2, channels * PATCH**2
    )


def unpack(
    tokens: Float[Array, "sample token feature"], rows: int, columns: int
) -> Float[Array, "sample height width channel"]:
    """What `pack` made of a latent, as one again."""
    samples, _, features = tokens.shape
    channels = features // PATCH**2
    grid = tokens.reshape(samples, rows, columns, channels, PATCH, PATCH)
    return grid.transpose(0, 1, 4, 2, 5, 3).reshape(
        samples, rows * PATCH, columns * PATCH, channels
    )
