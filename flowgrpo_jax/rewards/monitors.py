"""Measurements that are never optimised.

A policy that exploits its reward shows it elsewhere: the images of a prompt become
alike, colours become too strong, a grid of fine dots appears, other rewards fall.
`report/hacking.py` looks for that: the optimised reward is up and a monitor is down.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import ndimage

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards import registry, scoring
from flowgrpo_jax.runtime import metric_names

Pixels = Float[Array | np.ndarray, "sample height width 3"]
Owners = Int[np.ndarray, " sample"]
# (images, their prompts, the number of each image's prompt) -> {name: mean}
Monitor = Callable[[np.ndarray, Sequence[Prompt], np.ndarray], dict[str, float]]
Measure = Callable[[Pixels, Owners], float]
CLIP = "clip_diversity"


def make(
    names: Sequence[str],
    optimised: Mapping[str, float | int],
    context: registry.Context,
    deadline: float = 600.0,
) -> Monitor:
    """One monitor that measures all `names`: of `PIXELS`, `CLIP`, "objects", rewards.

    A reward that is measured here is held out: UserError if it is also optimised. If it
    fails or takes longer than `deadline` seconds, a line says so and its value is NaN.
    """
    for name in held_out(names):
        if not registry.is_known(name, context.options.get(name, ())):
            allowed = [*PIXELS, CLIP, "objects", *registry.REWARDS]
            raise not_one_of("monitors", name, allowed)
        if optimised.get(name):
            raise UserError(
                f"monitors: {name}: is optimised: it has a weight in reward"
            )
    for name in (*PIXELS, "objects"):
        if context.options.get(name):
            raise UserError(f"reward_options.{name}: this monitor has no options")
    if "objects" in names and context.detector is None:
        raise UserError("monitors: objects: needs a detector, and this model has none")
    rewards = {
        name: scoring.Scorer(registry.combine({name: 1.0}, context), deadline)
        for name in held_out(names)
    }
    measures = {name: PIXELS[name] for name in names if name in PIXELS}
    if CLIP in names:
        options = context.options.get(CLIP, {})
        measures[CLIP] = registry.built(CLIP, _clip_diversity, **options)

    def measure(images, prompts, owner) -> dict[str, float]:
        values = {
            name: of_images(images, owner) for name, of_images in measures.items()
        }
        if "objects" in names and context.detector is not None:
            values["objects"] = float(np.mean([*map(len, context.detector(images))]))
        for name, reward in rewards.items():
            measured = reward.finish([reward.start(images, prompts)], skip=True)
            scores = np.asarray(measured[name], np.float64)
            values[metric_names.reward(name)] = float(scores.mean())
            values[metric_names.deviation(name)] = float(scores.std())
        return values

    return measure


def held_out(names: Sequence[str]) -> list[str]:
    """The monitors that are rewards."""
    return [name for name in names if name not in (*PIXELS, CLIP, "objects")]


def diversity(images: Pixels, owner: Owners) -> float:
    """Root mean square difference of two samples of a prompt, in RGB units.

    The mean over pairs, then over prompts; NaN if no prompt has two samples.
    """
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    pairs = [np.sqrt(square / flat.shape[1]) for square in _squares(flat, owner)]
    return float(np.mean([one.mean() for one in pairs])) if pairs else float("nan")


def _clip_diversity(
    weights: str = "openai/clip-vit-large-patch14",
    processor: str | None = None,
    dtype: str = "float32",
    microbatch: int = 16,
) -> Measure:
    """Mean cosine distance of two samples of a prompt in CLIP's space; as `diversity`.

    Options: folder or hub id of a CLIPModel.
    """
    from flowgrpo_jax.rewards import clip_model

    clip = clip_model.load(CLIP, weights, processor, dtype)
    embed = jax.jit(clip.embed_images)

    def measure(images: Pixels, owner: Owners) -> float:
        starts = range(0, len(images), microbatch)
        parts = [
            embed(clip.params, jnp.asarray(images[i:][:microbatch])) for i in starts
        ]
        vectors = np.concatenate([np.asarray(part, np.float64) for part in parts])
        # Of unit vectors: |a - b|^2 = 2 (1 - cosine).
        pairs = [square.mean() / 2 for square in _squares(vectors, owner)]
        return float(np.mean(pairs)) if pairs else float("nan")

    return measure


def _squares(
    vectors: Float[np.ndarray, "sample feature"], owner: Owners
) -> list[Float[np.ndarray, " pair"]]:
    """Squared distances of all pairs of a prompt's samples, where it has two or more."""
    per_prompt = []
    for prompt in np.unique(owner):
        group = vectors[owner == prompt]
        if len(group) < 2:
            continue
        # Distances do not change under a shift, and the Gram matrix rounds less.
        group = group - group.mean(0)
        gram = group @ group.T
        square = np.add.outer(gram.diagonal(), gram.diagonal()) - 2 * gram
        per_prompt.append(square[np.triu_indices(len(group), k=1)].clip(0))
    return per_prompt


def saturation(images: Pixels, owner: Owners) -> float:
    """Mean saturation of HSV, in [0, 1]; black has none."""
    del owner
    pixels = np.asarray(images, np.float32)
    high, low = pixels.max(-1), pixels.min(-1)
    return float(np.mean((high - low) / np.maximum(high, 1e-6)))


def high_frequency(images: Pixels, owner: Owners) -> float:
    """Root mean square of what a 3x3 mean removes, in RGB units: dots and grids."""
    del owner
    pixels = np.asarray(images, np.float32)
    rest = pixels - ndimage.uniform_filter(pixels, (1, 3, 3, 1), mode="nearest")
    return float(np.sqrt(np.mean(np.square(rest, dtype=np.float64))))


PIXELS: dict[str, Measure] = {
    "diversity": diversity,
    "saturation": saturation,
    "high_frequency": high_frequency,
}
