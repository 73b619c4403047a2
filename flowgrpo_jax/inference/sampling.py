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

_SMALL = 128  # pixels: smaller images are enlarged on the grid


def sample(
    pipeline: Pipeline, variables: Any, num_prompts: int, num_images: int
) -> Float[np.ndarray, "prompt member height width 3"]:
    """Images in [0, 1] of the first prompts of a pipeline, by its sampler "ode"."""
    prompt, member = np.divmod(np.arange(num_prompts * num_images), num_images)
    images = pipeline.images(variables, prompt, member, "ode")
    return images.reshape(num_prompts, num_images, *images.shape[1:])


def save(output: Path, images: np.ndarray, texts: Sequence[str]) -> Path:
    """One PNG per image, named by prompt and member; the path of one that has all."""
    for number, (text, members) in enumerate(zip(texts, images, strict=True)):
        for member, image in enumerate(members):
            grids.save_grid(output / file_name(number, text, member), image[None], 1)
    prompts, num_images, height = images.shape[:3]
    path = output / "grid.png"
    grids.save_grid(
        path,
        images.reshape(prompts * num_images, *images.shape[2:]),
        columns=num_images,
        scale=max(1, _SMALL // height),
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
