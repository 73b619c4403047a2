"""Image grids: where each pixel goes."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.runtime.images import on_one_canvas, save_grid, to_uint8


def test_pixels_are_rounded_and_clipped():
    """Oracle: the definition, round(255 x) in [0, 255]."""
    values = np.array([-1.0, 0.0, 0.5, 1 / 255, 1.0, 2.0], np.float32)
    image = np.repeat(values[:, None, None], 3, axis=2)
    np.testing.assert_array_equal(to_uint8(image)[:, 0, 0], [0, 0, 128, 1, 255, 255])


def test_images_stand_row_by_row_enlarged_by_whole_pixels(tmp_path):
    """Oracle: the pixels written, at the places of a 2-pixel grid."""
    images = np.random.default_rng(0).random((5, 4, 6, 3), np.float32)
    save_grid(tmp_path / "grid.png", images, columns=3, scale=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 8 + 2, 3 * 12 + 4, 3)
    large = to_uint8(images).repeat(2, axis=1).repeat(2, axis=2)
    for index, image in enumerate(large):
        row, column = divmod(index, 3)
        y, x = row * 10, column * 14
        np.testing.assert_array_equal(grid[y : y + 8, x : x + 12], image)
    assert (grid[10:, 28:] == 255).all(), "no image in the last place"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_images_of_several_sizes_share_a_canvas():
    """Oracle: by hand; in the middle of the highest and the widest, white around."""
    tall, wide = np.full((4, 2, 3), 0.5), np.full((2, 6, 3), 0.25)
    sheet = on_one_canvas([tall, wide])
    assert sheet.shape == (2, 4, 6, 3)
    np.testing.assert_array_equal(sheet[0, :, :, 0], [[1, 1, 0.5, 0.5, 1, 1]] * 4)
    np.testing.assert_array_equal(sheet[1, :, 0, 0], [1, 0.25, 0.25, 1])
    np.testing.assert_array_equal(on_one_canvas([wide, wide])[1], wide)


@pytest.mark.parametrize("caption", ["a", "word " * 40, "x" * 200])
def test_captions_stay_below_their_image(tmp_path, caption):
    """Oracle: invariance; the second image's columns and all images are untouched."""
    images = np.zeros((2, 32, 32, 3), np.float32)
    save_grid(tmp_path / "a.png", images, 2, scale=2, captions=[caption, ""])
    save_grid(tmp_path / "b.png", images, 2, scale=2)
    with_text = np.asarray(Image.open(tmp_path / "a.png"))
    without = np.asarray(Image.open(tmp_path / "b.png"))
    np.testing.assert_array_equal(with_text[:64], without)
    assert (with_text[64:, :64] < 200).any(), "the caption is there"
    assert (with_text[64:, 64:] == 255).all(), "and goes no further"
