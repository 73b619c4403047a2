"""The size of a picture, as a config or a line of a prompt file says it."""

import re
from typing import Any, NamedTuple

# Pixels along the sides of a square, or "HEIGHTxWIDTH"; 0 for the model's own size.
Resolution = int | str

MOST = 8192  # pixels along a side
WANTED = f"0, pixels of a square such as 512, or HEIGHTxWIDTH such as 768x1344, at most {MOST}"


class Size(NamedTuple):
    """Pixels; it is written as HEIGHTxWIDTH."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def parse(resolution: Any) -> Size | None:
    """The size that is meant; None for 0, which leaves it to the model.

    ValueError, which says what must be there, for anything else.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int | str):
        raise ValueError(f"must be {WANTED}")
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(resolution), re.ASCII)
    if found is None:
        raise ValueError(f"must be {WANTED}")
    if str(resolution) == "0":
        return None
    size = Size(int(found[1]), int(found[2] or found[1]))
    if not all(1 <= side <= MOST for side in size):
        raise ValueError(f"must be {WANTED}")
    return size
