"""Images and grids of images as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_jax.runtime.workdir import atomic_write

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 2
_FONT_SIZE = 11
_LINE_HEIGHT = 13
_LINES = 3


def to_uint8(
    images: Float[np.ndarray, "*batch height width 3"],
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """Turns pixels in [0, 1] into 0..255, rounded; values outside are clipped."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def on_one_canvas(
    images: Sequence[Float[np.ndarray, "_ _ 3"]],
) -> Float[np.ndarray, "sample height width 3"]:
    """Images of any sizes as one array, in the highest and the widest: white around."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    canvas = np.ones((len(images), height, width, 3), np.float32)
    for place, image in zip(canvas, images, strict=True):
        rows, columns = image.shape[:2]
        top, left = (height - rows) // 2, (width - columns) // 2
        place[top : top + rows, left : left + columns] = image
    return canvas


def save_grid(
    path: str | Path,
    images: Shaped[np.ndarray, "sample height width 3"],
    columns: int,
    scale: int = 1,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes images in [0, 1] as one PNG, row by row; the file is whole or absent.

    `scale` repeats pixels, so that tiny images stay sharp. Captions are below their
    images, wrapped to their width and cut after three lines.
    """
    tiles = to_uint8(np.asarray(images, np.float32))
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    number, height, width, _ = tiles.shape
    columns = min(columns, number)
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [_wrap(text, font, width - 6) for text in captions or ()]
    below = max((len(wrapped) for wrapped in lines), default=0) * _LINE_HEIGHT
    below += 4 if captions else 0
    step_x, step_y = width + GAP, height + below + GAP
    rows = -(-number // columns)
    size = (columns * step_x - GAP, rows * step_y - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        x, y = index % columns * step_x, index // columns * step_y
        sheet.paste(Image.fromarray(tile), (x, y))
        for row, text in enumerate(lines[index] if captions else ()):
            at = (x + 1, y + height + 1 + row * _LINE_HEIGHT)
            draw.text(at, text, fill=(70, 70, 70), font=font)
    atomic_write(path, _png(sheet))


def png(image: Float[np.ndarray, "height width 3"]) -> bytes:
    """One image in [0, 1] as the bytes of a PNG file."""
    return _png(Image.fromarray(to_uint8(image)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """At most three lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    cut = lines[:_LINES]
    if len(lines) > _LINES:
        cut[-1] += "…"
    while font.getlength(cut[-1]) > width and len(cut[-1]) > 2:
        cut[-1] = cut[-1][:-2] + "…"
    return cut
