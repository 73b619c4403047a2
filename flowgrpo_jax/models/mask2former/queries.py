"""Mask2Former's transformer decoder: each query looks only where its mask is.

(Cheng et al. 2022, arXiv 2112.01527, section 3.2.) Layers go through the scales in
turn, coarse to fine; before each of them every query predicts its mask, and pixels
outside of it are closed to the query's attention.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former.pixels import (
    LEVELS,
    Map,
    Size,
    flatten,
    resize,
    sine_position,
)
from flowgrpo_jax.models.mask2former.swin import layer_norm

Queries = Float[Array, "image query _"]  # image, query, feature
Masks = Float[Array, "image query _ _"]  # image, query, height, width


class QueryDecoder(nn.Module):
    """Pixel embeddings and maps (coarse to fine) to (queries, mask logits)."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, embeddings: Map, maps: Sequence[Map]) -> tuple[Queries, Masks]:
        cfg = self.config
        sizes = [feature.shape[1:3] for feature in maps]
        tokens, places = self._tokens(maps)
        shape = (cfg.num_queries, cfg.hidden_dim)
        init = nn.initializers.normal(1.0)
        query_place = self.param("query_place", init, shape)
        queries = self.param("query_features", init, shape).astype(cfg.dtype)
        queries = jnp.broadcast_to(queries, (len(embeddings), *shape))
        norm = layer_norm("norm", cfg)
        predict_masks = _MaskHead(cfg, name="mask_head")
        masks = predict_masks(norm(queries), embeddings)
        for layer in range(cfg.decoder_layers - 1):
            level = layer % LEVELS
            queries = _Layer(cfg, name=f"layer{layer}")(
                queries,
                query_place,
                tokens[level],
                places[level],
                open_pixels(masks, sizes[level]),
            )
            masks = predict_masks(norm(queries), embeddings)
        return norm(queries), masks

    def _tokens(self, maps):
        """Tokens of each scale, and the encoding of their places."""
        cfg = self.config
        level_embed = self.param(
            "level_embed", nn.initializers.normal(1.0), (LEVELS, cfg.hidden_dim)
        )
        tokens, places = [], []
        for level, feature in enumerate(maps):
            place = sine_position(feature.shape[1:3], cfg.hidden_dim)
            places.append(place.reshape(-1, cfg.hidden_dim))
            if cfg.projects_input:
                feature = nn.Dense(
                    cfg.hidden_dim, dtype=cfg.dtype, name=f"input{level}"
                )(feature)
            tokens.append(flatten(feature) + level_embed[level].astype(cfg.dtype))
        return tokens, places


def open_pixels(masks: Masks, size: Size) -> Bool[Array, "image query token"]:
    """Pixels of a scale that each query may look at: its mask, or all if it is empty."""
    resized = resize(jnp.moveaxis(masks, 1, -1), size)
    inside = jnp.moveaxis(flatten(jax.nn.sigmoid(resized)), -1, 1) >= 0.5
    return inside | ~inside.any(axis=-1, keepdims=True)


class _MaskHead(nn.Module):
    """An MLP on every query; its product with a pixel's embedding is the mask logit."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, queries, embeddings):
        cfg = self.config
        widths = (cfg.hidden_dim, cfg.hidden_dim, cfg.mask_feature_size)
        for i, width in enumerate(widths):
            queries = nn.Dense(width, dtype=cfg.dtype, name=f"mlp{i}")(queries)
            if i < len(widths) - 1:
                queries = nn.relu(queries)
        return jnp.einsum("nqc,nhwc->nqhw", queries, embeddings).astype(jnp.float32)


class _Layer(nn.Module):
    """Masked attention to pixels, attention among queries, MLP; norms come after."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, queries, query_place, tokens, token_place, visible):
        cfg = self.config
        at = queries + query_place
        mixed = _Attention(cfg, name="cross")(at, tokens + token_place, tokens, visible)
        queries = layer_norm("cross_norm", cfg)(queries + mixed)
        at = queries + query_place
        mixed = _Attention(cfg, name="self")(at, at, queries, None)
        queries = layer_norm("self_norm", cfg)(queries + mixed)
        hidden = nn.Dense(cfg.dim_feedforward, dtype=cfg.dtype, name="mlp_in")(queries)
        hidden = nn.Dense(cfg.hidden_dim, dtype=cfg.dtype, name="mlp_out")(
            nn.relu(hidden)
        )
        return layer_norm("mlp_norm", cfg)(queries + hidden)


class _Attention(nn.Module):
    """Multi-head attention; the three projections lie in one kernel."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, query, key, value, visible):
        cfg = self.config
        width = cfg.hidden_dim
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (width, 3 * width)
        ).astype(cfg.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).astype(cfg.dtype)

        def heads(x, part):
            columns = slice(part * width, (part + 1) * width)
            projected = x.astype(cfg.dtype) @ kernel[:, columns] + bias[columns]
            return projected.reshape(*x.shape[:2], cfg.num_attention_heads, -1)

        query, key, value = heads(query, 0), heads(key, 1), heads(value, 2)
        logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
        logits = logits.astype(jnp.float32)
        if visible is not None:
            logits = jnp.where(visible[:, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(cfg.dtype)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, value)
        return nn.Dense(width, dtype=cfg.dtype, name="out")(
            mixed.reshape(*mixed.shape[:2], width)
        )
