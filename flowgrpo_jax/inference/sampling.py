"""Images of any prompts, and their files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flowgrpo_jax.inference.pipeline import Pipeline
from flowgrpo_jax.models.text import UNKNOWN, Tokenizer
from flowgrpo_jax.runtime import images as grids

Members = Float[np.ndarray, "member _ _ 3"]  # images of one prompt
_SMALL = 128  # pixels: smaller images are enlarged on the grid


def sample(
    pipeline: Pipeline, variables: Any, num_prompts: int, num_images: int
) -> Float[np.ndarray, "prompt member height width 3"]:
    """Images in [0, 1] of the first prompts of a pipeline, by its sampler "ode".

    All prompts are of one size.
    """
    return np.stack(by_prompt(pipeline, variables, num_prompts, num_images))


def by_prompt(
    pipeline: Pipeline, variables: Any, num_prompts: int, num_images: int
) -> list[Members]:
    """The same by prompt, each of its own size."""
    prompt, member = np.divmod(np.arange(num_prompts * num_images), num_images)
    found: dict[int, Members] = {}
    for places, images in pipeline.parts(variables, prompt, member, "ode"):
        whole = images.reshape(-1, num_images, *images.shape[1:])
        found |= zip(prompt[places[::num_images]].tolist(), whole, strict=True)
    return [found[number] for number in range(num_prompts)]


def save(output: Path, images: Sequence[Members], texts: Sequence[str]) -> Path:
    """One PNG per image, named by prompt and member; the path of one that has all."""
    for number, (text, members) in enumerate(zip(texts, images, strict=True)):
        for member, image in enumerate(members):
            grids.save_grid(output / file_name(number, text, member), image[None], 1)
    sheet = grids.on_one_canvas([image for members in images for image in members])
    num_images = len(images[0])
    path = output / "grid.png"
    grids.save_grid(
        path,
        sheet,
        columns=num_images,
        scale=max(1, _SMALL // sheet.shape[1]),
        captions=[text for text in texts for _ in range(num_images)],
    )
    return path


def file_name(number: int, text: str, member: int) -> str:
    """Such as 000_a-photo-of-a-red-circle_0.png."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-")[:60]
    return f"{number:03d}_{words}_{member}.png"


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that a word-level tokenizer cannot tell apart, in order."""
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in words if UNKNOWN in tokenizer([word])]
