"""What the embedded worlds' models share: the SD3 family's transformer, laptop-sized."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import lora
from flowgrpo_jax.models.encoders.word import WordEncoder
from flowgrpo_jax.models.files import config_json, safetensors_files, weights
from flowgrpo_jax.models.files.hub import SINGLE_FILE
from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder, Variables
from flowgrpo_jax.models.sd3.transformer import MMDiTConfig
from flowgrpo_jax.models.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an embedded model; stands in the header of its weights file."""

    width: int = 96
    depth: int = 4
    heads: int = 3
    patch: int = 4
    max_words: int = 6
    world: str = "sprites"  # whose pictures it paints


def make_model(
    size: Size,
    tokenizer: Tokenizer,
    height: int,
    width: int,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> FlowModel:
    """The networks, without weights, for pictures of height x width pixels.

    `dtype` is that of matmuls and residuals.
    """
    patches = max(height, width) // size.patch
    config = MMDiTConfig(
        sample_size=max(height, width),
        patch_size=size.patch,
        in_channels=3,
        out_channels=3,
        num_layers=size.depth,
        attention_head_dim=size.width // size.heads,
        num_attention_heads=size.heads,
        joint_attention_dim=size.width,
        pooled_projection_dim=size.width,
        pos_embed_max_size=patches,
        qk_norm="rms_norm",
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        dtype=dtype,
    )
    return FlowModel(
        name=size.world,
        config=config,
        text_encoder=WordEncoder(tokenizer.size, size.width, size.max_words),
        tokenizer=tokenizer,
        autoencoder=IdentityAutoencoder(),
        latent_shape=(height, width, 3),
        predicts="sample",
    )


def save(path: str | Path, variables: Variables, model: FlowModel) -> None:
    """Write variables, any LoRA folded in, and the model's size to one file."""
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    size = Size(
        width=config.width,
        depth=config.num_layers,
        heads=config.num_attention_heads,
        patch=config.patch_size,
        max_words=tokenizer.max_length,
        world=model.name,
    )
    folded = lora.fold(variables, config.lora_alpha)
    weights.save(path, folded, dataclasses.asdict(size))


def load(path: str | Path) -> tuple[Variables, Size]:
    """Variables in fp32 and size; UserError if the file is of another kind."""
    if "json" not in safetensors_files.read_header(Path(path)).metadata:
        raise UserError(
            f"model: {path}: holds other weights than those of an embedded model: give "
            "a weights.safetensors that this package has written, or for a checkpoint "
            f"in one file a folder of diffusers: {SINGLE_FILE}"
        )
    variables, size = weights.load(path)
    return variables, config_json.build(Size, size, {}, f"model: {path}: header", ())
