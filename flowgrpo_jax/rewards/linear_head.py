"""The five linear layers (no activations) on which aesthetic score and ImageReward end."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.files.tensors import Rule

# Numbers of the linear layers in the torch module; dropout stands between them.
LAYERS = (0, 2, 4, 6, 7)
WIDTHS = (1024, 128, 64, 16, 1)


def table(theirs: str = "", ours: str = "") -> list[Rule]:
    """Rows of the rename table; the names of file and parameters get these prefixes."""
    return [
        Rule(f"{ours}layers_(\\d)/kernel", rf"{theirs}layers.\1.weight", "dense"),
        Rule(f"{ours}layers_(\\d)/bias", rf"{theirs}layers.\1.bias"),
    ]


def shapes(width: int) -> dict[str, Any]:
    """Shapes of the parameters for vectors of `width`; they are always fp32."""
    like = {}
    for number, out in zip(LAYERS, WIDTHS, strict=True):
        like[f"layers_{number}"] = {
            "kernel": jax.ShapeDtypeStruct((width, out), jnp.float32),
            "bias": jax.ShapeDtypeStruct((out,), jnp.float32),
        }
        width = out
    return like


def read(path: str | Path, width: int) -> dict[str, Any]:
    """The parameters from a .safetensors file that has the torch module's names."""
    return jax.device_put(tensors.read(path, table(), shapes(width)))


def apply(
    params: Any, vectors: Float[Array, "image feature"]
) -> Float[Array, " image"]:
    """One number for each vector, fp32."""
    x = vectors.astype(jnp.float32)
    for number in LAYERS:
        layer = params[f"layers_{number}"]
        x = x @ layer["kernel"] + layer["bias"]
    return x[:, 0]
