"""A tiny embedded model with random weights that draw something, for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.worlds.sprites import model as sprites_model

SIZE = sprites_model.Size(width=32, depth=2, heads=2, patch=4)


def tiny_model(
    lora_rank: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[FlowModel, Variables]:
    """(model, host variables); zero-initialised layers are moved off zero."""
    model = sprites_model.make_model(SIZE, lora_rank, 2.0 * lora_rank, dtype)
    variables = jax.jit(model.init)(jax.random.key(0))
    if lora_rank:
        init_lora = functools.partial(model.init, lora=True)
        variables |= jax.jit(init_lora)(jax.random.key(1))
    rng = np.random.default_rng(0)

    def jitter(leaf):
        return np.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), np.float32)

    return model, jax.tree.map(jitter, variables)
