"""The model of the world of sprites: its vocabulary and its weights in this package."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.embedded import Size
from flowgrpo_jax.worlds.sprites import world
from flowgrpo_jax.worlds.text import WordTokenizer

WEIGHTS = Path(__file__).with_name("weights") / "model.safetensors"
_DEFAULT = Size()


def words() -> tuple[str, ...]:
    """All words of the world's prompts, without the tokenizer's stop words."""
    plural = tuple(
        name + ("es" if name.endswith("s") else "s") for name in world.SHAPES
    )
    other = ("and", "left", "right", "above", "below", "two", "three", "four")
    return (*world.SHAPES, *plural, *world.COLORS, *other)


def make_model(
    size: Size = _DEFAULT,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> FlowModel:
    """The networks, without weights; matmuls and residuals are in `dtype`."""
    tokenizer = WordTokenizer(words(), size.max_words)
    edge = world.SIZE
    return embedded.make_model(
        size, tokenizer, edge, edge, lora_rank, lora_alpha, dtype
    )
