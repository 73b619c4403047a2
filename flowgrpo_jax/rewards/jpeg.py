"""Rewards from the size of an image as JPEG: smooth images are small, busy ones large.

They need no network and do not read the prompt, so they show quickly whether a run
learns at all (DDPO, arXiv 2305.13301; scale and quality as in Flow-GRPO's code).
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.registry import Context, Reward
from flowgrpo_jax.runtime.images import to_uint8

QUALITY = 95


def kilobytes(images: Images) -> Float[np.ndarray, " image"]:
    """Size of each image as a JPEG of quality 95, in units of 1000 bytes."""
    return np.array([_size(pixels) for pixels in to_uint8(np.asarray(images))]) / 1000


def compressibility(context: Context) -> Reward:
    """The reward "jpeg_compressibility": -kilobytes / 500."""
    del context  # nothing to share

    def reward(images: Images, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        return {"jpeg_compressibility": -kilobytes(images) / 500}

    return reward


def incompressibility(context: Context) -> Reward:
    """The reward "jpeg_incompressibility": kilobytes, unscaled as in the reference."""
    del context

    def reward(images: Images, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        return {"jpeg_incompressibility": kilobytes(images)}

    return reward


def _size(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
