"""What a reward server and its clients say to each other: JSON or msgpack.

Images travel as PNG or JPEG files, prompts as plain values. Nothing that arrives is
ever executed, and what is too large is refused before it is unpacked.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.images import to_uint8

TYPES = {"json": "application/json", "msgpack": "application/msgpack"}
FORMATS = ("png", "jpeg")
MAX_VALUES = 1 << 16  # of a body, unless told otherwise
MAX_TEXT = 1 << 22  # bytes of JSON that is not ASCII
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits


class TooLarge(ValueError):
    """More pixels than are allowed."""


class Files(NamedTuple):
    """Image files of one size, whose headers were read and whose pixels were not."""

    data: list[bytes]
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return len(self.data) * self.width * self.height


def dump(body: Any, encoding: str) -> bytes:
    """The bytes of a body of plain values; bytes in it are base64 text in JSON.

    ValueError, TypeError, OverflowError or RecursionError for what it cannot say.
    """
    if encoding == "msgpack":
        return msgpack.packb(body)
    return json.dumps(body, default=_base64_text, allow_nan=False).encode()


def load(data: bytes | bytearray, encoding: str, most: int = MAX_VALUES) -> Any:
    """The plain values of a body.

    ValueError if it is malformed, or holds more than `most` values. They are counted
    before any of them is made.
    """
    try:
        if encoding == "msgpack":
            if _msgpack_values(data, most) > most:
                raise ValueError(f"more than {most} values")
            return msgpack.unpackb(data)
        # Every value but the first follows one of these characters. Base64 has none of
        # them; one inside a text is counted as if a value followed.
        if sum(data.count(letter) for letter in b"[{,") >= most:
            raise ValueError(f"more than {most} values")
        if len(data) > MAX_TEXT and not data.isascii():  # Python takes 4 bytes a letter
            raise ValueError(
                f"more than {MAX_TEXT} bytes: write \\u for foreign letters"
            )
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"body: not {encoding}: {reason}") from error


def image_file(image: Float[np.ndarray, "height width 3"], kind: str = "png") -> bytes:
    """A PNG or JPEG (quality 95) of an image in [0, 1]."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, kind, quality=95)
    return file.getvalue()


def files_from(values: Any, max_pixels: int, max_side: int) -> Files:
    """A list of files (bytes or base64 text), all images of one size.

    ValueError for anything else; TooLarge beyond `max_pixels` of all images together.
    """
    if not isinstance(values, list) or not values:
        raise ValueError("images: must be a list of PNG or JPEG files")
    data, sizes = [], []
    for number, value in enumerate(values):
        data.append(_file(value, f"images: {number}"))
        sizes.append(_size(data[-1], f"images: {number}", max_side))
    if any(size != sizes[0] for size in sizes):
        raise ValueError("images: must all have one size")
    files = Files(data, *sizes[0])
    if files.pixels > max_pixels:
        raise TooLarge(
            f"images: {len(data)} of {files.width} x {files.height} pixels: together "
            f"at most {max_pixels} pixels"
        )
    return files


def pixels_from(files: Files) -> Float32[np.ndarray, "image height width 3"]:
    """Their pixels in [0, 1]; ValueError for a damaged file."""
    pixels = np.empty((len(files.data), files.height, files.width, 3), np.float32)
    for number, data in enumerate(files.data):
        try:
            with _open(data) as image:
                pixels[number] = np.asarray(image.convert("RGB"))
        except Exception as error:  # a damaged file may do anything in a codec
            raise ValueError(f"images: {number}: cannot be read: {error}") from error
    pixels /= 255
    return pixels


def prompt_values(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Prompts as plain values."""
    return [
        {"text": p.text, "metadata": dict(p.metadata), "index": p.index}
        for p in prompts
    ]


def check_prompt(prompt: Prompt, encoding: str) -> None:
    """ValueError, which goes on from "the prompt", for one that a body cannot hold."""
    told = [prompt.text, dict(prompt.metadata), prompt.index]
    try:
        _check_texts(told)
        dump(told, encoding)
    except UnicodeError as error:
        raise ValueError("holds half of an emoji (a lone surrogate)") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot be sent as {encoding}: {str(error)[:120]}") from error


def check_named(reward: str, prompt: Prompt, encoding: str) -> None:
    """UserError that names reward and prompt for one that `check_prompt` refuses."""
    try:
        check_prompt(prompt, encoding)
    except ValueError as error:
        shown = ascii(prompt.text[:80])
        raise UserError(
            f"reward.{reward}: prompt {prompt.index} ({shown}) {error}"
        ) from error


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
        try:
            _check_texts([text, metadata])
        except UnicodeError as error:
            raise ValueError(f"prompts: {number}: holds half of an emoji") from error
        except RecursionError as error:
            raise ValueError(f"prompts: {number}: metadata is too deep") from error
        prompts.append(Prompt(text, metadata, index))
    return prompts


def _check_texts(value: Any) -> None:
    """UnicodeEncodeError for a text with half of a letter (a lone surrogate)."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _check_texts(key)
            _check_texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_texts(one)


def _base64_text(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is no plain value")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _file(value: Any, where: str) -> bytes:
    try:
        if isinstance(value, bytes):
            return value
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: must be bytes, or base64 text in JSON") from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["PNG", "JPEG"])


def _size(data: bytes, where: str, max_side: int) -> tuple[int, int]:
    """Width and height, by the header alone."""
    try:
        with _open(data) as image:
            size, mode = image.size, image.mode
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise ValueError(f"{where}: is no PNG or JPEG file") from error
    if max(size) > max_side:
        raise ValueError(
            f"{where}: {size[0]} x {size[1]} pixels: a side has at most {max_side}"
        )
    if mode not in _MODES:
        raise ValueError(f"{where}: {mode}: must have 8 bits a channel")
    return size


def _msgpack_values(data: bytes | bytearray, most: int) -> int:
    """How many values a body holds or announces, counted until they are too many.

    A list and a map count for what they announce: a header of five bytes would
    otherwise make room for 2^32 values that never come.
    """
    at, seen, count, letters = 0, 0, 1, 0
    while at < len(data) and seen < count <= most:
        kind = data[at]
        seen += 1
        if kind in _ANNOUNCES:
            width, each = _ANNOUNCES[kind]
            count += each * _whole_number(data, at + 1, width)
            at += 1 + width
        elif 0x80 <= kind <= 0x9F:  # a short map or list
            count += (kind & 0x0F) * (2 if kind < 0x90 else 1)
            at += 1
        elif kind in _LENGTHS:  # bytes, or from 0xD9 a text, after their length
            width = _LENGTHS[kind]
            length = _whole_number(data, at + 1, width)
            at += 1 + width + length
            letters += length if kind >= 0xD9 else 0
        elif 0xA0 <= kind <= 0xBF:
            at += 1 + (kind & 0x1F)
        elif kind in _NOT_PLAIN:
            raise ValueError(f"type {kind:#x}: must be plain values")
        else:
            at += 1 + _NUMBERS.get(kind, 0)
    if letters > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT} bytes of text: must be bytes")
    return count


def _whole_number(data: bytes | bytearray, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "big")


# First byte -> bytes that follow (github.com/msgpack/msgpack, spec.md). Those that are
# in no table stand alone.
_ANNOUNCES = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_NUMBERS = {0xCA: 4, 0xCB: 8, **{0xCC + n: 1 << n % 4 for n in range(8)}}
_NOT_PLAIN = {0xC1, 0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8}
