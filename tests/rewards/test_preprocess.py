"""Preprocessing on the device against PIL's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import preprocess
from flowgrpo_jax.rewards.preprocess import MEAN, STD, Preprocess

PIL_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def pictures(height: int, width: int) -> np.ndarray:
    """Noise, which shows every weight, and hard edges, which bicubic overshoots."""
    random = np.random.default_rng(height * width)
    noise = random.integers(0, 256, (1, height, width, 3))
    edges = random.integers(0, 2, (1, height, width, 3)) * 255
    return np.concatenate([noise, edges]).astype(np.uint8)


def by_pil(picture: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    image = Image.fromarray(picture).resize((width, height), PIL_FILTERS[name])
    return np.asarray(image)


@pytest.mark.parametrize("name", PIL_FILTERS)
@pytest.mark.parametrize(
    "before, after",
    [
        ((64, 64), (28, 28)),
        ((37, 53), (24, 34)),
        ((20, 24), (56, 67)),
        ((90, 17), (30, 17)),
        ((32, 32), (32, 32)),
    ],
)
def test_resize(before, after, name):
    images = pictures(*before)
    ours = preprocess.resize(jnp.asarray(images / 255.0), *after, name) * 255
    theirs = np.stack([by_pil(image, *after, name) for image in images])
    error = np.abs(np.asarray(ours) - theirs)
    assert error.max() <= 1.001
    # PIL's fixed-point weights decide otherwise about values halfway between two steps.
    assert (error > 0.01).mean() < 0.02


def test_values_between_steps_and_outside_are_rounded_first():
    images = jnp.asarray([-0.2, 0.4999 / 255, 0.5001 / 255, 1.3]).reshape(1, 2, 2, 1)
    ours = preprocess.to_8_bit(images) * 255
    np.testing.assert_allclose(ours.ravel(), [0, 0, 1, 255], atol=1e-4)


@pytest.mark.parametrize("size", [(48, 48), (33, 60), (70, 41)])
def test_crop(size):
    """Shorter side to 24 by PIL, middle square, normalised: CLIP's own steps."""
    images = pictures(*size)
    ours = Preprocess(24)(jnp.asarray(images / 255.0))
    height, width = (int(24 * side / min(size)) for side in size)
    top, left = (height - 24) // 2, (width - 24) // 2
    theirs = np.stack([by_pil(image, height, width, "bicubic") for image in images])
    theirs = theirs[:, top : top + 24, left : left + 24] / 255.0
    np.testing.assert_allclose(
        ours * np.array(STD), theirs - np.array(MEAN), atol=1.001 / 255
    )


@pytest.mark.parametrize("size", [(48, 48), (33, 60), (70, 41)])
def test_pad(size):
    """Longer side to 24 by PIL, pasted in the middle of a black square (HPS)."""
    images = pictures(*size)
    ours = Preprocess(24, fit="pad")(jnp.asarray(images / 255.0))
    height, width = (round(24 * side / max(size)) for side in size)
    theirs = []
    for picture in images:
        square = Image.new("RGB", (24, 24))
        small = Image.fromarray(by_pil(picture, height, width, "bicubic"))
        square.paste(small, ((24 - width) // 2, (24 - height) // 2))
        theirs.append(np.asarray(square) / 255.0)
    np.testing.assert_allclose(
        ours * np.array(STD), np.stack(theirs) - np.array(MEAN), atol=1.001 / 255
    )


def test_gradient_is_that_of_the_two_matrices():
    """Away from black and white, rounding is passed through and nothing is clipped."""
    images = jnp.full((1, 12, 10, 1), 0.5)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 7, 1)))
    ours = jax.grad(lambda x: (preprocess.resize(x, 5, 7, "bicubic") * weights).sum())(
        images
    )
    rows = preprocess.resize_matrix(12, 5, "bicubic")
    columns = preprocess.resize_matrix(10, 7, "bicubic")
    theirs = rows.T @ np.asarray(weights)[0, :, :, 0] @ columns
    np.testing.assert_allclose(ours[0, :, :, 0], theirs, atol=1e-5)


def written(folder, **values):
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def test_of_a_folder(tmp_path):
    assert Preprocess.from_folder(tmp_path, 224) == Preprocess(224)
    old = written(tmp_path, size=32, crop_size=32, resample=2, image_mean=[0.5] * 3)
    made = Preprocess.from_folder(old, 32)
    assert made == Preprocess(32, "bilinear", (0.5, 0.5, 0.5), STD)
    new = written(
        tmp_path, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    assert Preprocess.from_folder(new, 32) == Preprocess(32)


@pytest.mark.parametrize(
    "values, word",
    [
        ({"do_center_crop": False}, "do_center_crop"),
        ({"size": {"shortest_edge": 64}}, "64: the network takes 32"),
        ({"resample": 0}, "resample: 0"),
        ({"resample": [3]}, r"resample: \[3\]"),
        ({"rescale_factor": 1.0}, "rescale_factor: 1.0"),
        ({"do_pad": True}, "do_pad: true: not followed"),
        ({"image_mean": [0.5]}, r"image_mean: \[0.5\]: must be 3 numbers"),
        ({"image_std": [1.0, "x", 1.0]}, "image_std: "),
    ],
)
def test_what_is_not_implemented(tmp_path, values, word):
    with pytest.raises(UserError, match=word):
        Preprocess.from_folder(written(tmp_path, **values), 32)
