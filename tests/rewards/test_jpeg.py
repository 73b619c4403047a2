"""Rewards from the size of a JPEG file."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.registry import combine, make

NAMES = ("jpeg_compressibility", "jpeg_incompressibility")


def _images():
    noise = np.random.default_rng(0).random((2, 40, 24, 3), np.float32)
    return np.stack([noise[0], np.full_like(noise[0], 0.5), 3 * noise[1] - 1])


@pytest.mark.parametrize("numpy", [np, jnp])
def test_the_size_is_that_of_pils_file(numpy, tmp_path):
    """Oracle: bytes on disk, written by PIL at quality 95 from clipped pixels."""
    images = _images()
    sizes = []
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.jpg"
        pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
        sizes.append(path.stat().st_size)
    prompts = [Prompt("anything")] * 3
    measured = combine(dict.fromkeys(NAMES, 1.0))(numpy.asarray(images), prompts)
    np.testing.assert_allclose(measured[NAMES[0]], -np.array(sizes) / 500_000)
    np.testing.assert_allclose(measured[NAMES[1]], np.array(sizes) / 1000)


def test_smooth_images_compress_better():
    """Oracle: a grey image takes fewer bytes than noise does."""
    noise, grey, _ = make(NAMES[0])(_images(), [Prompt("")] * 3)[NAMES[0]]
    assert noise < grey < 0
