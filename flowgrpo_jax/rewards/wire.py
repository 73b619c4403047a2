"""What a reward server and its clients say to each other: JSON or msgpack.

Images travel as PNG or JPEG files, prompts as plain values. Nothing that arrives is
ever executed, and what is too large is refused before it is unpacked.
"""

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.runtime.images import to_uint8

TYPES = {"json": "application/json", "msgpack": "application/msgpack"}
FORMATS = ("png", "jpeg")


class TooLarge(ValueError):
    """More pixels than are allowed."""


def dump(body: Any, encoding: str) -> bytes:
    """The bytes of a body of plain values; bytes in it are base64 text in JSON."""
    if encoding == "msgpack":
        return msgpack.packb(body)
    return json.dumps(body, default=_base64_text, allow_nan=False).encode()


def load(data: bytes, encoding: str) -> Any:
    """The plain values of a body. ValueError if it is malformed."""
    try:
        return msgpack.unpackb(data) if encoding == "msgpack" else json.loads(data)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"body: not {encoding}: {reason}") from error


def image_file(image: Float[np.ndarray, "height width 3"], kind: str = "png") -> bytes:
    """A PNG or JPEG (quality 95) of an image in [0, 1]."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, kind, quality=95)
    return file.getvalue()


def images_from(
    files: Any, max_pixels: int
) -> Float32[np.ndarray, "image height width 3"]:
    """Images in [0, 1] from a list of files (bytes or base64 text), all of one size.

    ValueError for anything else; TooLarge beyond `max_pixels` of all images together,
    which the headers tell before any of them is unpacked.
    """
    if not isinstance(files, list) or not files:
        raise ValueError("images: must be a list of PNG or JPEG files")
    opened = [_open(file, f"images: {number}") for number, file in enumerate(files)]
    size = opened[0].size
    if any(image.size != size for image in opened):
        raise ValueError("images: must all have one size")
    if size[0] * size[1] * len(opened) > max_pixels:
        raise TooLarge(
            f"images: {len(opened)} of {size[0]} x {size[1]} pixels: together at most "
            f"{max_pixels} pixels"
        )
    try:
        pixels = [np.asarray(image.convert("RGB")) for image in opened]
    except Exception as error:  # a damaged file may do anything in a codec
        raise ValueError(f"images: cannot be read: {error}") from error
    return np.stack(pixels).astype(np.float32) / 255


def prompt_values(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Prompts as plain values."""
    return [
        {"text": p.text, "metadata": dict(p.metadata), "index": p.index}
        for p in prompts
    ]


def prompts_from(values: Any, count: int) -> list[Prompt]:
    """The prompts of `count` images; texts alone will do. ValueError otherwise."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"prompts: must be a list, one for each of {count} images")
    prompts = []
    for number, value in enumerate(values):
        value = {"text": value} if isinstance(value, str) else value
        fields = value if isinstance(value, dict) else {}
        text, metadata = fields.get("text"), fields.get("metadata", {})
        index = fields.get("index", number)
        if not isinstance(text, str) or not isinstance(metadata, dict):
            raise ValueError(f"prompts: {number}: must have a text and metadata")
        if not isinstance(index, int):
            raise ValueError(f"prompts: {number}: index must be a whole number")
        prompts.append(Prompt(text, metadata, index))
    return prompts


def _base64_text(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is no plain value")


def _open(file: Any, where: str) -> Image.Image:
    """An image whose header was read and whose pixels were not."""
    try:
        data = (
            file if isinstance(file, bytes) else base64.b64decode(file, validate=True)
        )
        return Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"{where}: must be bytes, or base64 text in JSON") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{where}: {error}") from error
    except Exception as error:
        raise ValueError(f"{where}: is no PNG or JPEG file") from error
