"""CLIP's weights: rename tables of the files that transformers and open_clip write."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders.clip import (
    CLIP,
    LEGACY_EOS,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from flowgrpo_jax.models.files import config_json, tensors, weight_folders
from flowgrpo_jax.models.files.tensors import Rule, Table
from flowgrpo_jax.runtime import paths

# Numbers of positions, which old files carry as tensors.
IGNORE = (r".*position_ids",)


def affine(ours: str, theirs: str, layout: str = "dense") -> list[Rule]:
    """Weight and bias of a linear layer, of a "conv", or of a norm ("same")."""
    weight = "scale" if layout == "same" else "kernel"
    return [
        Rule(f"{ours}/{weight}", f"{theirs}.weight", layout),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _layers(ours: str, theirs: str) -> list[Rule]:
    """The scanned layers of one tower, in transformers' names."""
    ours, theirs = f"{ours}layers", f"{theirs}encoder.layers.{{layer}}"
    query_key_value = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *affine(f"{ours}/(layer_norm[12])", rf"{theirs}.\1", "same"),
        Rule(
            f"{ours}/qkv/kernel",
            tuple(f"{name}.weight" for name in query_key_value),
            "dense",
        ),
        Rule(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in query_key_value)),
        *affine(f"{ours}/out", f"{theirs}.self_attn.out_proj"),
        *affine(f"{ours}/(fc[12])", rf"{theirs}.mlp.\1"),
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
        *affine(f"{ours}final_layer_norm", f"{prefix}final_layer_norm", "same"),
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
        *affine(f"{ours}pre_layernorm", f"{prefix}pre_layrnorm", "same"),
        *_layers(ours, prefix),
        *affine(f"{ours}post_layernorm", f"{prefix}post_layernorm", "same"),
        Rule(f"{ours}visual_projection/kernel", "visual_projection.weight", "dense"),
    ]


def _open_clip_layers(ours: str, theirs: str) -> list[Rule]:
    """The scanned layers of one tower, in open_clip's names."""
    ours, theirs = f"{ours}layers", f"{theirs}transformer.resblocks.{{layer}}"
    return [
        *affine(f"{ours}/layer_norm([12])", rf"{theirs}.ln_\1", "same"),
        # Query, key and value are one matrix there, too.
        Rule(f"{ours}/qkv/kernel", f"{theirs}.attn.in_proj_weight", "dense"),
        Rule(f"{ours}/qkv/bias", f"{theirs}.attn.in_proj_bias"),
        *affine(f"{ours}/out", f"{theirs}.attn.out_proj"),
        *affine(f"{ours}/fc1", f"{theirs}.mlp.c_fc"),
        *affine(f"{ours}/fc2", f"{theirs}.mlp.c_proj"),
    ]


TEXT_TABLE = text_table()
VISION_TABLE = vision_table()
TABLE: Table = [
    *text_table(ours="text/"),
    *vision_table(ours="vision/"),
    Rule("logit_scale", "logit_scale"),
]
OPEN_CLIP_TABLE: Table = [
    Rule("text/token_embedding/embedding", "token_embedding.weight"),
    Rule("text/position_embedding", "positional_embedding"),
    *_open_clip_layers("text/", ""),
    *affine("text/final_layer_norm", "ln_final", "same"),
    Rule("text/text_projection/kernel", "text_projection"),
    Rule("vision/class_embedding", "visual.class_embedding"),
    Rule("vision/position_embedding", "visual.positional_embedding"),
    Rule("vision/patch_embedding/kernel", "visual.conv1.weight", "conv"),
    *affine("vision/pre_layernorm", "visual.ln_pre", "same"),
    *_open_clip_layers("vision/", "visual."),
    *affine("vision/post_layernorm", "visual.ln_post", "same"),
    Rule("vision/visual_projection/kernel", "visual.proj"),
    Rule("logit_scale", "logit_scale"),
]


OPEN_CLIP_JSON = "open_clip_config.json"
# Of open_clip's configuration: what is read, and what only training looks at.
_OPEN_CLIP_KEYS = {
    "model": ("embed_dim", "quick_gelu", "text_cfg", "vision_cfg", "init_logit_scale"),
    "text": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    "vision": (
        *("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"),
        "patch_dropout",
    ),
}


def stored_text_table(path: str | Path) -> Table:
    """The table of the text tower in this file or folder, with its prefix or without."""
    names = weight_folders.contents(path)
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


def read(
    folder: str | Path,
    dtype: DTypeLike = jnp.float32,
    weights: str | Path | None = None,
) -> tuple[CLIP, Any]:
    """Both towers as (network, parameters of that dtype on the host).

    The folder is that of a CLIPModel of transformers, or one of open_clip's, which has
    an open_clip_config.json. `weights` is a file in its layout that replaces its own.
    """
    folder = Path(folder)
    file = paths.local(weights) if weights else _weights_file(folder)
    if is_open_clip(file):
        values = config_json.read(folder, OPEN_CLIP_JSON)
        config, table = open_clip_config(values), OPEN_CLIP_TABLE
    else:
        config, table = CLIPConfig.from_folder(folder), TABLE
    network = CLIP(config.with_dtype(dtype))
    return network, tensors.read(file, table, shapes(network), IGNORE)


def is_open_clip(weights: str | Path) -> bool:
    """Whether this file, or what `read` takes from this folder, is of open_clip."""
    path = Path(weights)
    file = _weights_file(path) if path.is_dir() else path
    return "visual.conv1.weight" in weight_folders.contents(file)


def _weights_file(folder: Path) -> Path:
    """Folders on the hub hold the weights in both layouts: transformers' come first."""
    ours = ("model.safetensors", f"model{weight_folders.INDEX}")
    other = folder / "open_clip_model.safetensors"
    if other.is_file() and not any((folder / name).is_file() for name in ours):
        return other
    return folder


def open_clip_config(values: Mapping[str, Any]) -> CLIPConfig:
    """From open_clip_config.json; UserError for towers that are no plain CLIP."""
    model = values.get("model_cfg", values)
    text, vision = model.get("text_cfg", {}), model.get("vision_cfg", {})
    for part, given in (("model", model), ("text", text), ("vision", vision)):
        where = f"model: open_clip_config.json: {part}_cfg"
        if not isinstance(given, Mapping):
            raise UserError(f"{where}: must be an object")
        config_json.check_known(given, {}, _OPEN_CLIP_KEYS[part], where)
    try:
        width, layers = vision["width"], vision["layers"]
        shared = {
            "projection_dim": model["embed_dim"],
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        }
        return CLIPConfig(
            CLIPTextConfig(
                hidden_size=text["width"],
                intermediate_size=int(text["width"] * text.get("mlp_ratio", 4)),
                num_hidden_layers=text["layers"],
                num_attention_heads=text["heads"],
                vocab_size=text.get("vocab_size", 49408),
                max_position_embeddings=text.get("context_length", 77),
                eos_token_id=LEGACY_EOS,  # read out at the largest id
                **shared,
            ),
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=int(width * vision.get("mlp_ratio", 4)),
                num_hidden_layers=layers,
                num_attention_heads=width // vision.get("head_width", 64),
                image_size=vision.get("image_size", 224),
                patch_size=vision["patch_size"],
                **shared,
            ),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"model: open_clip_config.json: {error}: only CLIP's own two towers are "
            "implemented"
        ) from error


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
