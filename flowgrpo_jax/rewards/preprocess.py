"""The preprocessing of CLIP-like networks, on the device and with PIL's arithmetic.

PIL filters columns, then rows, and rounds to 8 bits after each; where it shrinks an
image it widens the filter by the scale. Both passes are matrices here, built with
numpy, and gradients go straight through the rounding to 8 bits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.models.encoders.clip_weights import OPEN_CLIP_JSON
from flowgrpo_jax.models.files import config_json

# Those of OpenAI's CLIP, which OpenCLIP and BLIP also use.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic; PIL's `a` is -0.5 where torch's without antialiasing is -0.75."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# name -> (filter, half of its width)
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
# The filters by PIL's numbers, which preprocessor_config.json uses.
RESAMPLE = {2: "bilinear", 3: "bicubic"}


def resize_matrix(
    before: int, after: int, filter_name: str
) -> Float[np.ndarray, "after before"]:
    """The weights of `before` pixels in each of `after` pixels; rows add up to 1."""
    function, support = FILTERS[filter_name]
    ratio = before / after
    scale = max(ratio, 1.0)
    centre = (np.arange(after)[:, None] + 0.5) * ratio
    pixel = np.arange(before)[None]
    first = np.maximum((centre - support * scale + 0.5).astype(int), 0)
    last = np.minimum((centre + support * scale + 0.5).astype(int), before)
    weights = function((pixel - centre + 0.5) / scale)
    weights = np.where((pixel >= first) & (pixel < last), weights, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def to_8_bit(images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Values of [0, 1] in steps of 1/255; the gradient is that of clipping alone."""
    clipped = jnp.clip(images, 0.0, 1.0)
    stepped = jnp.floor(clipped * 255.0 + 0.5) / 255.0
    return clipped + jax.lax.stop_gradient(stepped - clipped)


def resize(
    images: Float[Array, "image height width channel"],
    height: int,
    width: int,
    filter_name: str,
) -> Float[Array, "image new_height new_width channel"]:
    """PIL's Image.resize of images in [0, 1], which are rounded to 8 bits before it."""
    images = to_8_bit(images.astype(jnp.float32))
    columns = resize_matrix(images.shape[2], width, filter_name)
    rows = resize_matrix(images.shape[1], height, filter_name)
    exact = jax.lax.Precision.HIGHEST  # TPUs multiply in bf16 otherwise
    images = to_8_bit(jnp.einsum("vw,nhwc->nhvc", columns, images, precision=exact))
    return to_8_bit(jnp.einsum("uh,nhwc->nuwc", rows, images, precision=exact))


BYTE = (1 / 255,)  # the only factor that brings bytes to [0, 1]
# How open_clip makes a square -> how `Preprocess` calls it.
RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}
_KEYS = (
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
    *("size", "crop_size", "resample", "image_mean", "image_std", "default_to_square"),
    *("image_processor_type", "feature_extractor_type", "processor_class"),
)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Makes an image a square of `size` pixels and normalises it.

    With `fit` "crop" the shorter side gets `size` pixels and the middle is kept; with
    "pad" the longer side gets them and black bars fill the rest; with "squash" both
    sides get them, whatever the shape. Where the middle is no whole pixel, transformers
    rounds down and torchvision, which open_clip uses, to the even one (`to_even`).
    """

    size: int = 224
    filter_name: str = "bicubic"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fit: str = "crop"
    to_even: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path, size: int) -> "Preprocess":
        """The steps in the folder's preprocessor_config.json; without it those of CLIP.

        UserError if the file names any other step, or a size of images that is not the
        `size` that the network takes.
        """
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            return cls(size)
        values = config_json.read(folder, path.name)
        where = f"model: {path}"
        config_json.check_known(values, {"rescale_factor": BYTE}, _KEYS, where)
        skipped = [
            step
            for step in ("resize", "center_crop", "rescale", "normalize")
            if not values.get(f"do_{step}", True)
        ]
        if skipped:
            raise UserError(f"model: {path}: do_{skipped[0]}: false is not implemented")
        for key in ("size", "crop_size"):
            if key in values and (side := _side(values[key])) != size:
                raise UserError(
                    f"model: {path}: {key}: {side}: the network takes {size}"
                )
        resample = values.get("resample", 3)
        if type(resample) is not int or resample not in RESAMPLE:
            raise not_one_of(f"model: {path}: resample", resample, RESAMPLE)
        return cls(
            size,
            RESAMPLE[resample],
            config_json.numbers(values, "image_mean", MEAN, where),
            config_json.numbers(values, "image_std", STD, where),
        )

    @classmethod
    def from_open_clip(cls, folder: str | Path, size: int) -> "Preprocess":
        """The steps in `preprocess_cfg` of the folder's open_clip_config.json.

        UserError for a step that is not implemented, or for another size than the
        network takes.
        """
        where = f"model: {Path(folder) / OPEN_CLIP_JSON}: preprocess_cfg"
        given = config_json.read(folder, OPEN_CLIP_JSON).get("preprocess_cfg") or {}
        if not isinstance(given, Mapping):
            raise UserError(f"{where}: must be an object")
        # What is null is as by default there.
        values = {key: value for key, value in given.items() if value is not None}
        only = {
            "size": (size, [size, size]),
            "mode": ("RGB",),
            "interpolation": tuple(FILTERS),
            "resize_mode": tuple(RESIZE_MODES),
            "fill_color": (0,),
        }
        config_json.check_known(values, only, ("mean", "std"), where)
        return cls(
            size,
            values.get("interpolation", "bicubic"),
            config_json.numbers(values, "mean", MEAN, where),
            config_json.numbers(values, "std", STD, where),
            RESIZE_MODES[values.get("resize_mode", "shortest")],
            to_even=True,
        )

    def __call__(
        self, images: Float[Array, "image height width 3"]
    ) -> Float[Array, "image size size 3"]:
        """Normalised pixels of images in [0, 1]; differentiable."""
        sides = images.shape[1:3]
        if self.fit == "crop":  # the longer side is rounded down to whole pixels
            height, width = (self.size * side // min(sides) for side in sides)
        elif self.fit == "pad":
            height, width = (round(side * self.size / max(sides)) for side in sides)
        else:
            height, width = self.size, self.size
        images = resize(images, height, width, self.filter_name)
        images = _centre(images, self.size, self.to_even)
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def _centre(
    images: Float[Array, "image height width 3"], size: int, to_even: bool
) -> Float[Array, "image size size 3"]:
    """The square in the middle, with black bars where an image is smaller."""
    for axis in (1, 2):
        spare = images.shape[axis] - size
        if spare >= 0:
            start = round(spare / 2) if to_even else spare // 2
            images = jax.lax.slice_in_dim(images, start, start + size, axis=axis)
        else:
            bars = [(0, 0)] * 4
            bars[axis] = (-spare // 2, -spare - (-spare // 2))
            images = jnp.pad(images, bars)
    return images


def _side(value: int | Mapping[str, Any]) -> Any:
    """The side of a square in any form in which transformers has written it."""
    if not isinstance(value, Mapping):
        return value
    sides = set(value.values())
    return sides.pop() if len(sides) == 1 else dict(value)
