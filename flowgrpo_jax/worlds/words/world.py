"""The world of words: three capitals in one font on a light strip of 12x24 pixels.

A strip is data (letters, ink, position), and only `render` paints it. Every letter is
in a cell of its own, so a model learns to spell letter by letter, words that it has
never seen among them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image, ImageDraw, ImageFont

LENGTH = 3  # letters of a word
CELL = 8  # pixels: width of a letter's cell, and the height of a capital
HEIGHT, WIDTH = 12, CELL * LENGTH
VOWELS = "AEIOU"
# Without Q, W and Z, which the OCR engine reads as O, V and 2 at eight pixels.
CONSONANTS = "BCDFGHJKLMNPRSTVXY"
LETTERS = VOWELS + CONSONANTS
GROUND = (0.90, 0.90, 0.88)
INKS = ((0.08, 0.08, 0.08), (0.14, 0.18, 0.60), (0.60, 0.10, 0.12), (0.06, 0.38, 0.16))
_BOX = CELL + 2  # rows of a cell: round letters are one row taller on each side
SHIFTS = HEIGHT - _BOX + 1  # possible positions of a word, from the top down


class Strip(NamedTuple):
    """A batch of strips."""

    letter: Int[Array | np.ndarray, "strip letter"]  # of LETTERS
    ink: Int[Array | np.ndarray, " strip"]  # of INKS
    shift: Int[Array | np.ndarray, " strip"]  # pixels down, below SHIFTS


@functools.cache
def glyphs() -> Float[np.ndarray, "letter row column"]:
    """How much ink lies on each pixel of each letter's cell, in [0, 1].

    The font is Aileron, which comes inside Pillow.
    """
    font = _font_of_height(CELL)
    return np.stack([_glyph(letter, font) for letter in LETTERS])


def _font_of_height(pixels: int) -> ImageFont.FreeTypeFont:
    """The font in the smallest size whose capitals are at least that high."""
    for quarter in range(4 * pixels, 16 * pixels):
        font = ImageFont.load_default(quarter / 4)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
        if -font.getbbox("H", anchor="ls")[1] >= pixels:
            return font
    raise AssertionError("no size of the font is that high")


def _glyph(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One letter in the middle of its cell; too wide a letter is cut on the right."""
    canvas, line = Image.new("L", (4 * CELL, 4 * CELL)), 3 * CELL
    ImageDraw.Draw(canvas).text((CELL, line), letter, 255, font, anchor="ls")
    ink = np.asarray(canvas, np.float32) / 255
    columns = np.flatnonzero(ink.max(axis=0) > 0.1)
    left, width = columns[0], min(columns[-1] + 1 - columns[0], CELL)
    start = (CELL - width) // 2
    cell = np.zeros((_BOX, CELL), np.float32)
    rows = slice(line - CELL - 1, line + 1)
    cell[:, start : start + width] = ink[rows, left : left + width]
    return cell


def render(strip: Strip) -> Float[Array, "strip height width channel"]:
    """Paint strips; RGB in [0, 1]."""
    cells = jnp.asarray(glyphs())[strip.letter]  # [strip, letter, row, column]
    rows = jnp.moveaxis(cells, 1, 2).reshape(-1, _BOX, WIDTH)
    below = jnp.pad(rows, ((0, 0), (0, HEIGHT - _BOX), (0, 0)))
    cover = jax.vmap(lambda one, by: jnp.roll(one, by, axis=0))(below, strip.shift)
    ground, ink = jnp.asarray(GROUND), jnp.asarray(INKS)[strip.ink]
    return ground + cover[..., None] * (ink[:, None, None, :] - ground)
