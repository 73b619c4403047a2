"""The multimodal diffusion transformer of the SD3 family (Esser et al. 2024).

Image and text tokens keep their own weights and share one attention; time and pooled
text modulate every block (adaLN). The class covers SD3, SD3.5 and the embedded model
by its config; parameter names follow diffusers' `SD3Transformer2DModel` where one
tensor maps to one (query, key and value are fused here).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.attention import attention
from flowgrpo_jax.models.blocks import FeedForward, dense, kept_out, modulation
from flowgrpo_jax.models.layers import Dense, LayerNorm, RMSNorm, timestep_embedding
from flowgrpo_jax.models.remat import rematerialized
from flowgrpo_jax.models.sd3 import positions
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig, groups


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
        begin = rematerialized(_begin, cfg.remat, in_scan=False)
        image, text, condition = begin(self, latents, sigma, context, pooled)

        # One scanned layer per group: compile time does not grow with depth.
        for group in groups(cfg):
            stack = nn.scan(
                rematerialized(_ScanBlock, cfg.remat, in_scan=True),
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=group.depth,
            )
            (image, text), _ = stack(cfg, group.dual, name=group.name)(
                (image, text), condition
            )
        final = rematerialized(_Block, cfg.remat, in_scan=False)
        dual = cfg.num_layers - 1 in cfg.dual_attention_layers
        image, _ = final(cfg, dual=dual, last=True, name="last_block")(
            image, text, condition
        )
        image = rematerialized(_finish, cfg.remat, in_scan=False)(
            self, image, condition
        )
        return unpatchify(image, rows, columns, cfg.patch_size)


def _begin(network: MMDiT, latents: Array, sigma: Array, context: Array, pooled: Array):
    """Tokens of image and text, and the activated condition, for the blocks."""
    cfg = network.config
    image = _Patchify(cfg, name="pos_embed")(latents)
    text = dense(cfg, "context_embedder", cfg.width)(context)
    condition = _TimeText(cfg, name="time_text_embed")(sigma, pooled)
    return image, text, nn.silu(condition)


def _finish(network: MMDiT, image: Array, condition: Array) -> Array:
    """What follows the blocks."""
    cfg = network.config
    scale, shift = modulation(cfg, 2, "norm_out")(condition)
    image = LayerNorm()(image) * (1 + scale) + shift
    features = cfg.patch_size**2 * cfg.out_channels
    zeros = nn.initializers.zeros
    return dense(cfg, "proj_out", features, kernel_init=zeros)(image)


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
        changes = modulation(cfg, 9 if self.dual else 6, "norm1")(condition)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = changes[:6]
        normed = LayerNorm()(image)
        image_in = normed * (1 + scale) + shift
        if self.last:
            text_scale, text_shift = modulation(cfg, 2, "norm1_context")(condition)
        else:
            text_changes = modulation(cfg, 6, "norm1_context")(condition)
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
        image = image + mlp_gate * FeedForward(cfg, name="ff")(mlp_in)
        if self.last:
            return image, text

        text_gate, mlp_shift, mlp_scale, mlp_gate = text_changes[2:]
        text = text + text_gate * text_out
        mlp_in = LayerNorm()(text) * (1 + mlp_scale) + mlp_shift
        text = text + mlp_gate * FeedForward(cfg, name="ff_context")(mlp_in)
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
            _query_key_value(cfg, image, "attn/"),
            _query_key_value(cfg, text, "attn/add_"),
        ]
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(*streams, strict=True)]
        mixed = attention(*joined, kind=cfg.attention)
        image_out = kept_out(dense(cfg, "attn/to_out", cfg.width)(mixed[:, :tokens]))
        if self.last:
            return image_out, None
        text_out = dense(cfg, "attn/to_add_out", cfg.width)(mixed[:, tokens:])
        return image_out, kept_out(text_out)


class _SelfAttention(nn.Module):
    """The second attention of a dual block (SD3.5-medium): image tokens only."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, image):
        cfg = self.config
        heads = _query_key_value(cfg, image, "attn2/")
        mixed = attention(*heads, kind=cfg.attention)
        return kept_out(dense(cfg, "attn2/to_out", cfg.width)(mixed))


def _query_key_value(cfg: MMDiTConfig, tokens, prefix: str):
    """Fused projections of one stream, as heads, query and key normalised.

    What `remat` keeps of them is the product itself, from which the gradient of the
    norms asks for no second one.
    """
    fused = dense(cfg, f"{prefix}qkv", 3 * cfg.width, parts=3)(tokens)
    fused = checkpoint_name(fused, "qkv")
    prefix = prefix.rpartition("/")[2]
    shape = (*tokens.shape[:2], 3, cfg.num_attention_heads, cfg.attention_head_dim)
    query, key, value = jnp.moveaxis(fused.reshape(shape), 2, 0)
    if cfg.qk_norm == "rms_norm":
        query = RMSNorm(name=f"{prefix}norm_q")(query)
        key = RMSNorm(name=f"{prefix}norm_k")(key)
    return query, key, value


class _Patchify(nn.Module):
    """Patches to tokens (a strided convolution written as a matmul), plus position."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, latents):
        cfg = self.config
        patch = cfg.patch_size
        samples, height, width, channels = latents.shape
        if height % patch or width % patch:
            raise UserError(
                f"latents: {height}x{width}: must be multiples of patch_size {patch}"
            )
        rows, columns = height // patch, width // patch
        patches = latents.reshape(samples, rows, patch, columns, patch, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(samples, rows * columns, patch * patch * channels)
        size, base = cfg.pos_embed_max_size, cfg.sample_size // patch
        if cfg.position_crop is None:
            table = positions.table(cfg.width, size, base, rows, columns)
        else:
            stored = self.variable(
                "buffers",
                "table",
                positions.table,
                cfg.width,
                size,
                base,
                *cfg.position_crop,
            )
            table = positions.recropped(stored.value, size, rows, columns)
        tokens = Dense(cfg.width, dtype=cfg.dtype, name="proj")(patches)
        return tokens + jnp.asarray(table, cfg.dtype).reshape(-1, cfg.width)


class _TimeText(nn.Module):
    """Condition vector: embedded timestep plus embedded pooled text."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, sigma, pooled):
        cfg = self.config
        time = timestep_embedding(1000.0 * sigma).astype(cfg.dtype)
        parts = []
        for name, vector in (("timestep", time), ("text", pooled)):
            layer = f"time_text_embed/{name}"
            hidden = nn.silu(dense(cfg, f"{layer}_1", cfg.width)(vector))
            parts.append(dense(cfg, f"{layer}_2", cfg.width)(hidden))
        return parts[0] + parts[1]


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
