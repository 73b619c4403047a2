"""What a detector sees in an image; rewards read nothing else of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float

# Values in [0, 1]; a JAX array may stay on its device until a detector needs it.
Images = Float[Array | np.ndarray, "image height width 3"]


@dataclass(frozen=True)
class Detection:
    """One object: its class, confidence in [0, 1], box in pixels, and colour.

    The box is (x0, y0, x1, y1) with y downwards. The colour is a word of the
    prompts' vocabulary, or None where the detector names none.
    """

    class_name: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None
    mask: Bool[np.ndarray, "height width"] | None = field(
        default=None, compare=False, repr=False
    )


@runtime_checkable
class Detector(Protocol):
    """Finds the objects in a batch of images: one list for each image.

    A detector may have its vocabulary as `classes` and, if it names colours,
    `color_names`. Prompts that ask for other words are then refused.
    """

    def __call__(self, images: Images) -> list[list[Detection]]: ...


@runtime_checkable
class ColorNamer(Protocol):
    """Names the colours of objects, each given with the number of its image.

    `color_names`, if it has them, are the only colours that it names.
    """

    def __call__(
        self, images: Images, objects: Sequence[tuple[int, Detection]]
    ) -> list[str]: ...
