"""Pictures that are part of a page: data URLs, captions, and sheets through training."""

import base64
import functools
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.runtime import samples
from flowgrpo_jax.runtime.images import GAP

_FRAMES = 10  # the most evaluations that the slider goes through
_TILES = 24  # the most pictures of each
_BYTES = 1_800_000  # of all pictures of a sheet together, before base64
_SIDE = 256  # pixels: a larger picture is made smaller
_EMBEDDED_BYTES = 400_000  # a larger PNG becomes a JPEG
_EMBEDDED_SIDE = 1024  # pixels; the longest side of that JPEG
_SMALL = 128  # pixels: the browser shows smaller ones as large pixels, not blurred


@dataclass(frozen=True)
class Picture:
    """An image with its alternative text, a caption and a remark.

    `source` is a data URL.
    """

    source: str
    alternative: str
    caption: str
    remark: str = ""


@dataclass(frozen=True)
class Frame:
    """One evaluation: a source and a caption for every prompt of the sheet."""

    iteration: int
    sources: list[str]
    captions: list[str]

    @property
    def plain(self) -> dict[str, Any]:
        """Values of JSON, for the slider."""
        return {
            "iteration": self.iteration,
            "sources": self.sources,
            "captions": self.captions,
        }


@dataclass(frozen=True)
class Sheet:
    """The same prompts and noise at some evaluations, the first and last among them.

    `is_small`: of pictures that are shown as large pixels. `whole`: grids of a run that
    kept no prompts beside them.
    """

    prompts: list[str]
    frames: list[Frame]
    is_small: bool
    whole: bool


@dataclass(frozen=True)
class Group:
    """A prompt of the latest iteration with its best and its worst image."""

    prompt: str
    best: Picture
    worst: Picture


def contact_sheet(
    folder: Path, rewards: Sequence[str], share: float = 1.0
) -> Sheet | None:
    """The sheet of the grids `iteration_<number>.png` in a folder; None without any.

    `rewards` are the scores to tell; `share` of the bytes that a page may have.
    """
    grids = sorted(folder.glob("iteration_*.png"), key=_iteration)
    if not grids:
        return None
    last = len(grids) - 1
    chosen = np.unique(
        np.linspace(0, last, min(len(grids), _FRAMES)).round().astype(int)
    )
    grids = [grids[n] for n in chosen]
    told = [samples.read_words(folder, grid.stem) for grid in grids]
    whole = not all(_has_words(one) for one in told)
    if not whole:
        first = [one["prompt"] for one in told[0]["samples"]]
        whole = any([one["prompt"] for one in t["samples"]] != first for t in told)
    places = [0] if whole else _places(grids, told, share)
    frames = []
    for grid, words in zip(grids, told, strict=True):
        sources = _sources(grid, words, places, whole)
        captions = [f"iteration {_iteration(grid)}"]
        if not whole:
            captions = [
                samples.scores_text(words["samples"][n]["scores"], rewards)
                for n in places
            ]
        if sources:
            frames.append(Frame(_iteration(grid), sources, captions))
    if not frames:
        return None
    if whole:
        return Sheet([""], frames, False, True)
    prompts = [told[0]["samples"][n]["prompt"] for n in places]
    return Sheet(prompts, frames, _is_small(told[0]), False)


def groups(
    folder: Path, rewards: Sequence[str]
) -> tuple[int | None, list[Group], bool]:
    """(iteration, groups, whether they are small) of `samples.GROUPS`, if it is there."""
    told = samples.read_words(folder, samples.GROUPS)
    grid = folder / f"{samples.GROUPS}.png"
    if not _has_words(told) or not grid.exists():
        return None, [], False
    count = len(told["samples"])
    sources = _sources(grid, told, list(range(count)), False)
    pictures = [
        Picture(
            source,
            f"{which} of {words['prompt']}",
            which,
            samples.scores_text(words["scores"], (*rewards, "advantage")),
        )
        for number, (source, words) in enumerate(
            zip(sources, told["samples"], strict=False)
        )
        for which in [("best", "worst")[number % 2]]
    ]
    pairs = zip(pictures[::2], pictures[1::2], strict=False)
    return (
        told.get("iteration"),
        [
            Group(told["samples"][2 * n]["prompt"], best, worst)
            for n, (best, worst) in enumerate(pairs)
        ],
        _is_small(told),
    )


def data_url(png: bytes) -> str:
    """A data URL of a PNG; a large one becomes a JPEG of at most 1024 pixels."""
    data, kind = png, "png"
    if len(data) > _EMBEDDED_BYTES:
        data, kind = _jpeg(Image.open(io.BytesIO(data)), _EMBEDDED_SIDE), "jpeg"
    return _url(data, kind)


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(image: Image.Image, side: int) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _has_words(told: Mapping[str, Any]) -> bool:
    """Whether the text beside a grid is one that `samples.save` wrote."""
    return bool(told.get("samples")) and {"columns", "tile", "scale"} <= told.keys()


def _is_small(told: Mapping[str, Any]) -> bool:
    return max(told["tile"]) // told["scale"] < _SMALL


def _places(grids, told, share: float) -> list[int]:
    """As many pictures of the sheet as fit, from all of its tasks."""
    count = len(told[0]["samples"])
    first = _sources(grids[0], told[0], [0], False)
    each = len(first[0]) * 3 / 4 if first else 1
    most = int(min(_TILES * share, share * _BYTES / each / len(grids)))
    return np.unique(
        np.linspace(0, count - 1, max(2, most)).round().astype(int)
    ).tolist()


def _sources(
    grid: Path, told: Mapping[str, Any], places: Sequence[int], whole: bool
) -> list[str]:
    """Data URLs of some pictures of a grid; [] for a file that is no picture."""
    try:
        if whole:
            return [data_url(grid.read_bytes())]
        tile = (*told["tile"], told["columns"], told["scale"])
        return list(_cut(grid, grid.stat().st_mtime_ns, tile, tuple(places)))
    except (OSError, ValueError, Image.DecompressionBombError):
        return []


@functools.lru_cache(maxsize=2 * _FRAMES)
def _cut(
    grid: Path, changed: int, tile: tuple[int, int, int, int], places: tuple[int, ...]
) -> tuple[str, ...]:
    """Tiles of a grid, in their own size or at most `_SIDE`; kept until it changes."""
    del changed
    height, width, columns, scale = tile
    sources = []
    with Image.open(grid) as sheet:
        for place in places:
            row, column = divmod(place, columns)
            x, y = column * (width + GAP), row * (height + GAP)
            one = sheet.crop((x, y, x + width, y + height))
            if scale > 1:
                one = one.resize(
                    (width // scale, height // scale), Image.Resampling.NEAREST
                )
            if max(one.size) < _SMALL:
                buffer = io.BytesIO()
                one.save(buffer, format="PNG", optimize=True)
                sources.append(_url(buffer.getvalue(), "png"))
            else:
                sources.append(_url(_jpeg(one, _SIDE), "jpeg"))
    return tuple(sources)


def _iteration(path: Path) -> int:
    digits = re.search(r"(\d+)", path.stem)
    return int(digits[1]) if digits else 0
