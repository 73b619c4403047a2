"""What the embedded worlds' models share: a small transformer and a weights file."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import lora, small
from flowgrpo_jax.models.encoders.word import WordEncoder
from flowgrpo_jax.models.files import config_json, safetensors_files, weights
from flowgrpo_jax.models.files.hub import SINGLE_FILE
from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder, Variables
from flowgrpo_jax.models.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an embedded model, as the header of its weights file has it."""

    width: int = 96
    depth: int = 4
    heads: int = 3
    patch: int = 4
    max_words: int = 6
    world: str = "sprites"  # the world whose pictures it generates


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

    Matmuls and residuals are computed in `dtype`.
    """
    shape = small.Shape(size.width, size.depth, size.heads, size.patch)
    network = small.denoiser(shape, max(height, width), 3, dtype)
    return FlowModel(
        name=size.world,
        denoiser=network.with_options(lora_rank=lora_rank, lora_alpha=lora_alpha),
        text_encoder=WordEncoder(tokenizer.size, size.width, size.max_words),
        tokenizer=tokenizer,
        text_tokens=tokenizer.max_length,
        autoencoder=IdentityAutoencoder(),
        latent_shape=(height, width, 3),
        predicts="sample",
    )


def save(path: str | Path, variables: Variables, model: FlowModel) -> None:
    """Writes variables, with any LoRA folded in, and the model's size to one file."""
    shape, tokenizer = small.shape_of(model.denoiser), model.tokenizer
    assert tokenizer is not None
    size = Size(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        patch=shape.patch,
        max_words=tokenizer.max_length,
        world=model.name,
    )
    folded = lora.fold(variables, model.denoiser.lora_alpha)
    weights.save(path, folded, dataclasses.asdict(size))


def load(path: str | Path) -> tuple[Variables, Size]:
    """The variables in fp32 and the size; UserError for a file of another kind."""
    size = read_size(path)
    return weights.load(path)[0], size


def read_size(path: str | Path) -> Size:
    """The size alone; UserError for a file of another kind."""
    if "json" not in safetensors_files.read_header(Path(path)).metadata:
        raise UserError(
            f"model: {path}: holds other weights than those of an embedded model: give "
            "a weights.safetensors that this package has written; if it is a large "
            f"model in one file, {SINGLE_FILE}"
        )
    size = weights.read_metadata(path)
    return config_json.build(Size, size, {}, f"model: {path}: header", ())
