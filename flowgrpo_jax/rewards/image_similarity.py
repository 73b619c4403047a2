"""The reward "image_similarity": cosine with a reference image, by CLIP ViT-L/14.

The score is in [-1, 1]. A prompt's metadata names its reference as `reference_image`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import clip_model
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.scorer import Scorer

KEY = "reference_image"


def make(
    context: Context,
    weights: str = clip_model.CLIP_L,
    processor: str | None = None,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Scorer:
    """`weights` is the folder or hub id of a CLIPModel; see `clip_model`."""
    clip = clip_model.load("image_similarity", weights, processor, dtype)
    embed = jax.jit(clip.embed_images)

    @functools.cache
    def reference(path: str) -> np.ndarray:
        return np.asarray(embed(clip.params, jnp.asarray(_read(path)))[0])

    def references(prompts: Sequence[Prompt]) -> np.ndarray:
        return np.stack([reference(_path(prompt)) for prompt in prompts])

    def score(params, images, wanted):
        return (clip.embed_images(params, images) * wanted).sum(axis=-1)

    return Scorer(
        "image_similarity", clip.params, score, references, microbatch, check_prompt
    )


def check_prompt(prompt: Prompt) -> None:
    """ValueError for a prompt without such a file; it goes on from "the prompt"."""
    path = prompt.metadata.get(KEY)
    if not isinstance(path, str):
        raise ValueError(f"must name an image file in its metadata, as {KEY!r}")
    try:
        with Image.open(path):  # reads only the header
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"has {KEY} {path!r}: cannot be read ({error})") from error


def _path(prompt: Prompt) -> str:
    if not isinstance(path := prompt.metadata.get(KEY), str):
        raise UserError(
            f"reward: image_similarity: prompt {prompt.text!r}: its metadata must name "
            f"an image file as {KEY!r}"
        )
    return path


def _read(path: str) -> Float[np.ndarray, "1 height width 3"]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float32)[None] / 255.0
    except OSError as error:
        raise UserError(
            f"reward: image_similarity: {KEY}: {path}: cannot be read ({error})"
        ) from error
