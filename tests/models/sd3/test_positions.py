"""The positional table: its formula and its crops."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.sd3 import positions


def diffusers_table(width, max_size, base_size):
    """get_2d_sincos_pos_embed in float64, axis by axis: [max, max, width]."""

    def one_axis(positions):
        omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4.0))
        out = positions.reshape(-1)[:, None] * omega[None]
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    scale = max_size / base_size  # diffusers divides by it (interpolation_scale 1)
    axis = np.arange(max_size, dtype=np.float64) / scale
    grid_w, grid_h = np.meshgrid(axis, axis)  # "w goes first"
    table = np.concatenate([one_axis(grid_w), one_axis(grid_h)], axis=1)
    return table.reshape(max_size, max_size, width)


@pytest.mark.parametrize(
    "max_size, base_size, rows, columns",
    [(6, 4, 4, 4), (6, 6, 6, 6), (192, 64, 7, 5), (9, 4, 2, 8), (9, 4, 9, 3)],
)
def test_position_table(max_size, base_size, rows, columns):
    """Oracle: diffusers' formula in float64, its centre crop, also non-square."""
    whole = diffusers_table(16, max_size, base_size)
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    crop = whole[top : top + rows, left : left + columns]
    found = positions.table(16, max_size, base_size, rows, columns)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, crop, atol=1e-7)


def test_position_table_refuses_larger_pictures():
    """Oracle: the contract; the table cannot be cropped to more than itself."""
    with pytest.raises(UserError, match="pos_embed_max_size=6"):
        positions.table(16, 6, 4, 7, 2)


@pytest.mark.parametrize("size", [8, 9])
def test_crops_of_crops(size):
    """Oracle: the direct crop, for every size that fits, odd and even."""
    for rows, columns in np.ndindex(size, size):
        held = positions.table(8, size, 4, rows + 1, columns + 1)
        for less in ((1, 1), (rows + 1, 1), (1, columns + 1), (rows, columns)):
            if min(less):
                found = positions.recropped(held, size, *less)
                direct = positions.table(8, size, 4, *less)
                np.testing.assert_array_equal(found, direct)


def test_a_crop_cannot_grow():
    """Oracle: the contract; one line with both sizes."""
    held = positions.table(8, 9, 4, 4, 6)
    with pytest.raises(UserError, match="5x6 patches: exceed the 4x6"):
        positions.recropped(held, 9, 5, 6)
