"""Pictures that are part of a page: data URLs, captions, and the contact sheet."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_BETWEEN = 6  # the most pictures between the first and the last
_EMBEDDED_BYTES = 400_000  # a larger PNG becomes a JPEG
_EMBEDDED_SIDE = 1024  # pixels; the longest side of that JPEG


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
class Sheet:
    """Samples from the same noise: the first, the last, and some from between."""

    ends: list[Picture]
    between: list[Picture]


def contact_sheet(samples: Path) -> Sheet | None:
    """The sheet of the grids `iteration_<number>.png` in a folder; None without any."""
    grids = sorted(samples.glob("iteration_*.png"), key=_iteration)
    if not grids:
        return None
    last = len(grids) - 1
    parts = min(_BETWEEN, last - 1) + 1
    between = [grids[round(i * last / parts)] for i in range(1, parts)]
    ends = [_sample(grids[0], "before")]
    if last:
        ends.append(_sample(grids[-1], "after"))
    return Sheet(ends, [_sample(path) for path in between])


def data_url(png: bytes) -> str:
    """A data URL of a PNG; a large one becomes a JPEG of at most 1024 pixels."""
    data, kind = png, "png"
    if len(data) > _EMBEDDED_BYTES:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((_EMBEDDED_SIDE, _EMBEDDED_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _sample(path: Path, remark: str = "") -> Picture:
    caption = f"iteration {_iteration(path)}"
    source = data_url(path.read_bytes())
    return Picture(source, f"samples at {caption}", caption, remark)


def _iteration(path: Path) -> int:
    digits = re.search(r"(\d+)", path.stem)
    return int(digits[1]) if digits else 0
