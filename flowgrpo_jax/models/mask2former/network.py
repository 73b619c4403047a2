"""Mask2Former for instance segmentation (Cheng et al. 2022, arXiv 2112.01527).

A Swin backbone, the pixel decoder and the query decoder; every query ends as a class
(or "none") and a mask. It is transformers' `Mask2FormerForUniversalSegmentation`, and
GenEval's detector with the COCO weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.files.tensors import Rule
from flowgrpo_jax.models.mask2former import swin
from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former.pixels import PixelDecoder
from flowgrpo_jax.models.mask2former.queries import QueryDecoder
from flowgrpo_jax.models.mask2former.swin import affine, dense


@struct.dataclass
class Segmentation:
    """What the network says of each query; the last class is "no object"."""

    class_logits: Float[Array, "image query class"]
    mask_logits: Float[Array, "image query height width"]  # a quarter of the input


class Mask2Former(nn.Module):
    """Normalised pixels to classes and masks of the queries."""

    config: Mask2FormerConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "image height width 3"]) -> Segmentation:
        cfg = self.config
        features = swin.Swin(cfg.backbone, name="backbone")(pixels)
        embeddings, maps = PixelDecoder(cfg, name="pixels")(features)
        queries, masks = QueryDecoder(cfg, name="queries")(embeddings, maps)
        classes = nn.Dense(len(cfg.labels) + 1, name="classes")(queries)
        return Segmentation(classes, masks)


def _under(ours: str, theirs: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a part, named as the whole names it."""

    def prefixed(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(names, str):
            return theirs + names
        return tuple(theirs + name for name in names)

    return tuple(
        dataclasses.replace(rule, ours=ours + rule.ours, theirs=prefixed(rule.theirs))
        for rule in rules
    )


_OURS, _THEIRS = r"layer(\d+)/", r"layers.\1."
# A 1x1 convolution is a dense layer of patches of one pixel.
_PIXELS: tuple[Rule, ...] = (
    Rule("level_embed", "level_embed"),
    *dense(r"input(\d+)", r"input_projections.\1.0", patch=1),
    *affine(r"input(\d+)_norm", r"input_projections.\1.1"),
    Rule("lateral/kernel", "adapter_1.0.weight", "patch", patch=1),
    *affine("lateral_norm", "adapter_1.1"),
    Rule("smooth/kernel", "layer_1.0.weight", "conv"),
    *affine("smooth_norm", "layer_1.1"),
    *dense("mask_projection", "mask_projection", patch=1),
    *_under(
        _OURS,
        "encoder." + _THEIRS,
        (
            *dense(r"attention/(\w+)", r"self_attn.\2"),
            *affine("norm1", "self_attn_layer_norm"),
            *affine("norm2", "final_layer_norm"),
            *dense("mlp_in", "fc1"),
            *dense("mlp_out", "fc2"),
        ),
    ),
)
_SELF = tuple(f"self_attn.{part}_proj" for part in "qkv")
_QUERIES: tuple[Rule, ...] = (
    Rule("query_place", "queries_embedder.weight"),
    Rule("query_features", "queries_features.weight"),
    Rule("level_embed", "level_embed.weight"),
    *dense(r"input(\d+)", r"input_projections.\1", patch=1),
    *affine("norm", "decoder.layernorm"),
    *dense(r"mask_head/mlp(\d)", r"decoder.mask_predictor.mask_embedder.\1.0"),
    *_under(
        _OURS,
        "decoder." + _THEIRS,
        (
            Rule("cross/kernel", "cross_attn.in_proj_weight", "dense"),
            Rule("cross/bias", "cross_attn.in_proj_bias"),
            *dense("cross/out", "cross_attn.out_proj"),
            *affine("cross_norm", "cross_attn_layer_norm"),
            Rule("self/kernel", tuple(f"{part}.weight" for part in _SELF), "dense"),
            Rule("self/bias", tuple(f"{part}.bias" for part in _SELF)),
            *dense("self/out", "self_attn.out_proj"),
            *affine("self_norm", "self_attn_layer_norm"),
            *dense("mlp_in", "fc1"),
            *dense("mlp_out", "fc2"),
            *affine("mlp_norm", "final_layer_norm"),
        ),
    ),
)
# Parameter path -> tensor of a transformers file.
TABLE: tuple[Rule, ...] = (
    *_under("backbone/", "model.pixel_level_module.encoder.", swin.TABLE),
    *_under("pixels/", "model.pixel_level_module.decoder.", _PIXELS),
    *_under("queries/", "model.transformer_module.", _QUERIES),
    *dense("classes", "class_predictor"),
)
# Tensors of a file that the network has no use for: constants, the loss, and the norm
# of a classifier that the backbone is not.
UNUSED = (
    r".*\.relative_position_index",
    r"criterion\..*",
    r"model\.pixel_level_module\.encoder\.(swin\.)?layernorm\..*",
)


def shapes(config: Mask2FormerConfig) -> Any:
    """Parameters as shapes, in the type that the network computes in."""
    pixels = jnp.zeros((1, 64, 64, 3))
    like = jax.eval_shape(Mask2Former(config).init, jax.random.key(0), pixels)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), like["params"]
    )


def load(folder: str | Path, config: Mask2FormerConfig, sharding: Any = None) -> dict:
    """Parameters of a transformers folder, on `sharding` or as numpy."""
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes(config),
    )
    return tensors.read(folder, TABLE, like, UNUSED)
