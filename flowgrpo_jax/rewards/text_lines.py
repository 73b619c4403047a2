"""A line of text as an OCR engine read it, with its confidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from flowgrpo_jax.rewards.detection import Images

BLANK = ""  # the symbol of CTC that stands for no character


@dataclass(frozen=True)
class Line:
    """One line: its text, the confidence in [0, 1], and the recogniser's output.

    `probabilities` are those of `symbols` in every frame, before CTC merges frames.
    """

    text: str
    confidence: float
    probabilities: Float[np.ndarray, "frame symbol"] = field(compare=False, repr=False)
    symbols: tuple[str, ...] = field(compare=False, repr=False)


# images -> the lines of each, in reading order
Reader = Callable[[Images], Sequence[Sequence[Line]]]
