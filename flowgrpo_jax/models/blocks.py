"""What the blocks of all transformers are made of: adapted layers, MLP, modulation.

`cfg` is the config of any of them: width, dtype, mlp_ratio and the options of LoRA.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from flowgrpo_jax.models.layers import Dense


def dense(cfg: Any, layer: str, features: int, parts: int = 1, **options: Any) -> Dense:
    """The layer of that name in `transformer_config`, with LoRA if it is to have it."""
    return Dense(
        features,
        parts=parts,
        lora_rank=cfg.lora_rank if layer in cfg.lora_targets else 0,
        lora_alpha=cfg.lora_alpha,
        dtype=cfg.dtype,
        name=layer.rpartition("/")[2],
        **options,
    )


def kept_out(tokens: Array) -> Array:
    """What a gate multiplies, by the name under which `remat` may keep it."""
    return checkpoint_name(tokens, "out")


class FeedForward(nn.Module):
    """Two layers with GELU between; `prefix` stands before its name in LoRA targets."""

    config: Any
    prefix: str = ""

    @nn.compact
    def __call__(self, tokens):
        cfg, layer = self.config, f"{self.prefix}{self.name}"
        hidden = dense(cfg, f"{layer}/proj", cfg.mlp_ratio * cfg.width)(tokens)
        hidden = checkpoint_name(hidden, "hidden")
        hidden = nn.gelu(hidden, approximate=True)
        return kept_out(dense(cfg, f"{layer}/out", cfg.width)(hidden))


def modulation(cfg: Any, changes: int, name: str):
    """adaLN: `changes` vectors [sample, 1, width] from the activated condition.

    Zero at the start of pretraining, so that every block begins as the identity.
    """
    zeros = nn.initializers.zeros
    layer = dense(cfg, name, changes * cfg.width, kernel_init=zeros)

    def vectors(condition):
        joined = checkpoint_name(layer(condition), "modulation")
        return jnp.split(joined[:, None], changes, axis=-1)

    return vectors
