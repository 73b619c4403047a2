"""The positional table of SD3's picture tokens: sines and cosines, centre-cropped."""

import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError


def table(
    width: int, max_size: int, base_size: int, rows: int, columns: int
) -> Float[np.ndarray, "row column width"]:
    """Sine-cosine table: the centre crop of the full one.

    Coordinates are scaled so that `base_size` patches span `base_size` units of the
    `max_size` grid, as in diffusers' `PatchEmbed`.
    """
    _check(rows, columns, max_size, max_size, max_size)
    place = np.arange(max_size, dtype=np.float64) * base_size / max_size
    frequency = 10_000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    angle = place[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    # The column coordinate fills the first half of the features.
    whole = np.concatenate(
        np.broadcast_arrays(
            axis[None, left : left + columns], axis[top : top + rows, None]
        ),
        axis=-1,
    )
    return whole.astype(np.float32)


def recropped(
    held: Float[Array | np.ndarray, "row column width"],
    max_size: int,
    rows: int,
    columns: int,
) -> Float[Array | np.ndarray, "rows columns width"]:
    """What the whole table's centre crop would be, out of a larger centre crop."""
    _check(rows, columns, held.shape[0], held.shape[1], max_size)
    top, left = (
        (max_size - wanted) // 2 - (max_size - have) // 2
        for wanted, have in zip((rows, columns), held.shape[:2], strict=True)
    )
    return held[top : top + rows, left : left + columns]


def _check(rows: int, columns: int, most: int, wide: int, max_size: int) -> None:
    if rows > most or columns > wide:
        raise UserError(
            f"latents: {rows}x{columns} patches: exceed the {most}x{wide} of the "
            f"positional table (pos_embed_max_size={max_size})"
        )
