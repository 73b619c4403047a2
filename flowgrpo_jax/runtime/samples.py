"""Pictures of a run with what was asked for and what they got, as files.

samples/iteration_000100.png    a grid of pictures
samples/iteration_000100.json   for each of them prompt, tag and scores, and the
                                mean scores of every prompt of that evaluation
samples/groups.png  groups.json best and worst of some groups of the latest iteration
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flowgrpo_jax.runtime import images as grids
from flowgrpo_jax.runtime.workdir import atomic_write, parse_json

COLUMNS = 12
_SMALL = 96  # pixels: smaller pictures are enlarged by a whole number
GROUPS = "groups"


@dataclass(frozen=True)
class Sample:
    """An image in [0, 1], its prompt and tag, and its scores by name."""

    image: Float[np.ndarray, "height width channel"] = field(repr=False)
    prompt: str
    scores: Mapping[str, float]
    tag: str = ""

    def caption(self, names: Sequence[str]) -> str:
        """`prompt | reward: 0.93`, with the scores of these names."""
        return f"{self.prompt} | {scores_text(self.scores, names)}"


def scores_text(scores: Mapping[str, float | None], names: Sequence[str]) -> str:
    """`geneval: 0.93, ocr: 0.5`: those of these names that are measured."""
    return ", ".join(
        f"{name}: none" if value is None else f"{name}: {value:.3g}"
        for name in dict.fromkeys(names)
        if name in scores
        for value in [scores[name]]
    )


def name_of(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def save(
    folder: Path,
    name: str,
    samples: Sequence[Sample],
    by_prompt: Sequence[Mapping[str, Any]] = (),
    columns: int = COLUMNS,
    **facts: Any,
) -> None:
    """Write NAME.png and NAME.json; the text comes first, so that no grid lacks it."""
    images = grids.on_one_canvas([one.image for one in samples])
    height, width = images.shape[1:3]
    scale = max(1, _SMALL // height)
    told = {
        **facts,
        "columns": min(columns, len(samples)),
        "tile": [height * scale, width * scale],
        "scale": scale,
        "samples": [
            {"prompt": one.prompt, "tag": one.tag, "scores": _plain(one.scores)}
            for one in samples
        ],
        "prompts": [
            one | {"scores": _plain(one["scores"])} for one in map(dict, by_prompt)
        ],
    }
    atomic_write(folder / f"{name}.json", json.dumps(told) + "\n")
    grids.save_grid(folder / f"{name}.png", images, columns, scale)


def read_words(folder: Path, name: str) -> dict[str, Any]:
    """What NAME.json says; {} if it is not there or cannot be read."""
    try:
        told = parse_json((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _plain(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of JSON, with the digits that anyone reads; None for no number."""
    return {
        name: float(f"{float(value):.5g}") if np.isfinite(value) else None
        for name, value in scores.items()
    }
