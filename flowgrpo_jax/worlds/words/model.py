"""The model of the world of words, which reads letters; its weights are here."""

import functools
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.text import LetterTokenizer
from flowgrpo_jax.worlds.words import world

WEIGHTS = Path(__file__).with_name("weights") / "model.safetensors"
Size = functools.partial(
    embedded.Size,
    width=64,
    depth=3,
    heads=2,
    patch=4,
    max_words=world.LENGTH,
    world="words",
)
_DEFAULT = Size()


def make_model(
    size: embedded.Size = _DEFAULT,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> FlowModel:
    """The networks, without weights; matmuls and residuals are in `dtype`."""
    tokenizer = LetterTokenizer(world.LETTERS, size.max_words)
    return embedded.make_model(
        size, tokenizer, world.HEIGHT, world.WIDTH, lora_rank, lora_alpha, dtype
    )
