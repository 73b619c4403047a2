"""CLIP's weights: rename tables of the files that transformers and open_clip write."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.models import safetensors_files, tensors
from flowgrpo_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig
from flowgrpo_jax.models.tensors import Rule, Table

# Numbers of positions, which old files carry as tensors.
IGNORE = (r".*position_ids",)


def _affine(ours: str, theirs: str, kernel: str = "dense") -> list[Rule]:
    """Weight and bias of a linear layer (`kernel` "dense") or of a norm ("same")."""
    weight = "kernel" if kernel == "dense" else "scale"
    return [
        Rule(f"{ours}/{weight}", f"{theirs}.weight", kernel),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _layers(ours: str, theirs: str) -> list[Rule]:
    """The scanned layers of one tower, in transformers' names."""
    ours, theirs = f"{ours}layers", f"{theirs}encoder.layers.{{layer}}"
    query_key_value = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *_affine(f"{ours}/(layer_norm[12])", rf"{theirs}.\1", "same"),
        Rule(
            f"{ours}/qkv/kernel",
            tuple(f"{name}.weight" for name in query_key_value),
            "dense",
        ),
        Rule(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in query_key_value)),
        *_affine(f"{ours}/out", f"{theirs}.self_attn.out_proj"),
        *_affine(f"{ours}/(fc[12])", rf"{theirs}.mlp.\1"),
    ]


def text_table(prefix: str = "text_model.", ours: str = "") -> Table:
    """The text tower; transformers 5 writes CLIPTextModel with an empty prefix."""
    return [
        Rule(
            f"{ours}token_embedding/embedding",
            f"{prefix}embeddings.token_embedding.weight",
        ),
        Rule(
            f"{ours}position_embedding", f"{prefix}embeddings.position_embedding.weight"
        ),
        *_layers(ours, prefix),
        *_affine(f"{ours}final_layer_norm", f"{prefix}final_layer_norm", "same"),
        Rule(f"{ours}text_projection/kernel", "text_projection.weight", "dense"),
    ]


def vision_table(prefix: str = "vision_model.", ours: str = "") -> Table:
    """The image tower."""
    place = f"{prefix}embeddings."
    return [
        Rule(f"{ours}class_embedding", f"{place}class_embedding"),
        Rule(f"{ours}position_embedding", f"{place}position_embedding.weight"),
        Rule(f"{ours}patch_embedding/kernel", f"{place}patch_embedding.weight", "conv"),
        # The spelling is theirs.
        *_affine(f"{ours}pre_layernorm", f"{prefix}pre_layrnorm", "same"),
        *_layers(ours, prefix),
        *_affine(f"{ours}post_layernorm", f"{prefix}post_layernorm", "same"),
        Rule(f"{ours}visual_projection/kernel", "visual_projection.weight", "dense"),
    ]


TEXT_TABLE = text_table()
VISION_TABLE = vision_table()
TABLE: Table = [
    *text_table(ours="text/"),
    *vision_table(ours="vision/"),
    Rule("logit_scale", "logit_scale"),
]


def stored_text_table(path: str | Path) -> Table:
    """The table of the text tower in this file or folder, with its prefix or without."""
    names = safetensors_files.contents(path)
    bare = "embeddings.token_embedding.weight" in names
    return text_table("") if bare else TEXT_TABLE


def read_text(
    folder: str | Path, dtype: DTypeLike = jnp.float32
) -> tuple[CLIPText, Any]:
    """A text_encoder folder as (network, parameters of that dtype on the host)."""
    config = dataclasses.replace(CLIPTextConfig.from_folder(folder), dtype=dtype)
    network = CLIPText(config)
    table = stored_text_table(folder)
    return network, tensors.read(folder, table, text_shapes(network), IGNORE)


def read(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[CLIP, Any]:
    """A CLIPModel's folder as (network, parameters of that dtype on the host)."""
    network = CLIP(CLIPConfig.from_folder(folder).with_dtype(dtype))
    return network, tensors.read(folder, TABLE, shapes(network), IGNORE)


def text_shapes(network: CLIPText) -> Any:
    """Parameters of a text tower as shapes, in the type that it computes in."""
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return _as(network.config.dtype, like["params"])


def shapes(network: CLIP) -> Any:
    """Parameters of both towers as shapes, in the type that they compute in."""
    vision = network.config.vision
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, vision.num_channels))
    ids = jnp.zeros((1, 2), jnp.int32)
    like = jax.eval_shape(network.init, jax.random.key(0), pixels, ids)
    return _as(vision.dtype, like["params"])


def _as(dtype: DTypeLike, like: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
