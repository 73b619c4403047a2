"""Rotary positions of FLUX: three axes, pairs of neighbouring features.

Su et al. 2021 (arXiv 2104.09864), with an axis of its own for rows and for
columns; as in diffusers' `FluxPosEmbed`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

THETA = 10_000.0
Table = Float32[np.ndarray, "token pair"]


@functools.cache
def tables(
    text_tokens: int, rows: int, columns: int, axes: tuple[int, ...]
) -> tuple[Table, Table]:
    """Cosines and sines of every token: text first, then the image row by row.

    Text stands at (0, 0, 0), an image token at (0, row, column). Made in float64.
    """
    image = np.zeros((rows, columns, 3))
    image[..., 1] = np.arange(rows)[:, None]
    image[..., 2] = np.arange(columns)
    place = np.concatenate([np.zeros((text_tokens, 3)), image.reshape(-1, 3)])
    angles = np.concatenate(
        [
            place[:, axis, None] * THETA ** (-np.arange(0, size, 2) / size)
            for axis, size in enumerate(axes)
        ],
        axis=1,
    )
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    heads: Float[Array, "sample token head depth"],
    cosine: Float[jax.Array | np.ndarray, "token pair"],
    sine: Float[jax.Array | np.ndarray, "token pair"],
) -> Float[Array, "sample token head depth"]:
    """Every pair of neighbouring features turned by its token's angle, in fp32."""
    pairs = heads.astype(jnp.float32).reshape(*heads.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cosine, sine = cosine[:, None], sine[:, None]  # alike for all heads
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.stack(turned, axis=-1).reshape(heads.shape).astype(heads.dtype)
