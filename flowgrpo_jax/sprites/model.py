"""The embedded model: the SD3 family's transformer at a size that a laptop trains."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.models import lora, weights
from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder, Variables
from flowgrpo_jax.models.mmdit import MMDiTConfig
from flowgrpo_jax.models.text import WordEncoder, WordTokenizer
from flowgrpo_jax.sprites import world

WEIGHTS = Path(__file__).with_name("weights") / "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an embedded model; stands in the header of its weights file."""

    width: int = 96
    depth: int = 4
    heads: int = 3
    patch: int = 4
    max_words: int = 6


def words() -> tuple[str, ...]:
    """All words of the world's prompts but the tokenizer's stop words."""
    plural = tuple(
        name + ("es" if name.endswith("s") else "s") for name in world.SHAPES
    )
    other = ("and", "left", "right", "above", "below", "two", "three", "four")
    return (*world.SHAPES, *plural, *world.COLORS, *other)


def make_model(
    size: Size = Size(),
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> FlowModel:
    """The networks, without weights; `dtype` is that of matmuls and residuals."""
    tokenizer = WordTokenizer(words(), size.max_words)
    config = MMDiTConfig(
        sample_size=world.SIZE,
        patch_size=size.patch,
        in_channels=3,
        out_channels=3,
        num_layers=size.depth,
        attention_head_dim=size.width // size.heads,
        num_attention_heads=size.heads,
        joint_attention_dim=size.width,
        pooled_projection_dim=size.width,
        pos_embed_max_size=world.SIZE // size.patch,
        qk_norm="rms_norm",
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        dtype=dtype,
    )
    return FlowModel(
        name="sprites",
        config=config,
        text_encoder=WordEncoder(tokenizer.size, size.width, size.max_words),
        tokenizer=tokenizer,
        autoencoder=IdentityAutoencoder(),
        latent_shape=(world.SIZE, world.SIZE, 3),
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
    )
    folded = lora.fold(variables, config.lora_alpha)
    weights.save(path, folded, dataclasses.asdict(size))


def load(path: str | Path = WEIGHTS) -> tuple[Variables, Size]:
    """Variables in fp32 and size; by default the shipped pretrained model."""
    variables, size = weights.load(path)
    return variables, Size(**size)
