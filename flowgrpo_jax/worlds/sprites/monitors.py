"""Measurements of what a policy does to its pictures when it exploits the reward.

With GenEval's reward alone, objects multiply, the background fills with dots too faint
to be objects, and colours that the prompt leaves open become one or two. The reward
shows none of that.
"""

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage

from flowgrpo_jax.rewards.monitors import diversity
from flowgrpo_jax.worlds.sprites import detector, world


def measure(
    images: Float[Array | np.ndarray, "sample height width channel"],
    owner: Int[np.ndarray, " sample"],
    *,
    color_free: Bool[np.ndarray, " sample"] | None = None,
    found: detector.Objects | None = None,
) -> dict[str, float]:
    """Monitors of reward hacking for samples in [0, 1] of the prompts `owner`.

    Args:
      images: RGB samples.
      owner: prompt of each sample; samples of a prompt are compared with each other.
      color_free: which samples have a prompt that leaves colours open; default all.
      found: the result of `detector.detect_arrays(images)`, if the caller has it.

    Returns:
      objects: mean number of objects per image, unknown ones included.
      unknown: share of the objects without a known shape, in [0, 1].
      background_energy: root mean square deviation of the pixels off the objects from
        `world.BACKGROUND`, in RGB units.
      background_texture: the part of it that differs from pixel to pixel (dots, noise),
        against a 3x3 mean, in RGB units.
      color_entropy: entropy in bits of the colours of objects, at most log2(colours).
      diversity: root mean square RGB difference of two samples of a prompt, mean over
        pairs, then over prompts; NaN if no prompt has two samples.
    """
    images = np.asarray(images, np.float32)
    objects = detector.detect_arrays(images) if found is None else found
    if color_free is None:
        color_free = np.ones(len(images), bool)
    energy, texture = background(images, objects.owner < 0)
    return {
        "objects": len(objects.image) / len(images),
        "unknown": float(np.mean(objects.shape < 0)) if len(objects.shape) else 0.0,
        "background_energy": energy,
        "background_texture": texture,
        "color_entropy": entropy(objects.color[color_free[objects.image]]),
        "diversity": diversity(images, owner),
    }


def background(
    images: Float[np.ndarray, "sample height width channel"],
    ground: Bool[np.ndarray, "sample height width"],
) -> tuple[float, float]:
    """Root mean square deviation of ground pixels, and of its 3x3 high-pass part."""
    if not ground.any():
        return 0.0, 0.0
    weight = ground[..., None].astype(np.float32)
    deviation = (images - np.asarray(world.BACKGROUND, np.float32)) * weight
    # The mean over ground pixels only, so that objects do not leak into it.
    window = (1, 3, 3, 1)
    mean = ndimage.uniform_filter(deviation, window, mode="constant")
    mean /= ndimage.uniform_filter(weight, window, mode="constant").clip(1e-3)
    rest = (deviation - mean)[ground]
    energy = np.mean(np.square(deviation[ground], dtype=np.float64))
    return float(np.sqrt(energy)), float(np.sqrt(np.mean(rest.astype(float) ** 2)))


def entropy(values: Int[np.ndarray, "object"]) -> float:
    """Entropy of a discrete sample in bits; 0 for an empty one."""
    _, counts = np.unique(values, return_counts=True)
    share = counts / max(len(values), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0  # no negative zero
