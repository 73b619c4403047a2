"""CLIP names the colours of objects, as GenEval does it.

It chooses among ten colours without training, by the benchmark's three wordings. The
picture is cut to the object's box, and what is outside of the mask is painted grey.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from flowgrpo_jax.data.geneval_grammar import COLORS10
from flowgrpo_jax.models.encoders.clip import normalise
from flowgrpo_jax.rewards import clip_model
from flowgrpo_jax.rewards.detection import Detection, Images

GREY = np.uint8(0x99)
WORDINGS = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class ClipColors:
    """A `rewards.detection.ColorNamer`; `weights` is a CLIPModel's folder or hub id."""

    color_names = COLORS10

    def __init__(
        self,
        weights: str = clip_model.CLIP_L,
        dtype: str = "float32",
        microbatch: int = 32,  # crops at a time
    ):
        clip = clip_model.load("geneval", weights, None, dtype, option="colors")
        self._params, self._tokens = clip.params, clip.tokens
        self._side = clip.network.config.vision.image_size
        self._microbatch = microbatch
        self._classifiers: dict[str, np.ndarray] = {}

        def classify(params, ids):
            vectors = clip.network.bind({"params": params}).embed_text(ids)
            vectors = vectors.reshape(len(COLORS10), len(WORDINGS), -1)
            return normalise(vectors.mean(axis=1))

        self._embed, self._classify = jax.jit(clip.embed_images), jax.jit(classify)

    def __call__(
        self, images: Images, objects: Sequence[tuple[int, Detection]]
    ) -> list[str]:
        """One of the ten colours for each object, given with its image's number."""
        crops = [crop(images[image], one, self._side) for image, one in objects]
        names = []
        for start in range(0, len(crops), self._microbatch):
            batch = np.stack(crops[start : start + self._microbatch])
            spare = [(0, self._microbatch - len(batch))] + [(0, 0)] * 3
            pixels = np.pad(batch, spare).astype(np.float32) / 255
            vectors = np.asarray(self._embed(self._params, jnp.asarray(pixels)))
            for (_, one), vector in zip(objects[start:], vectors, strict=False):
                likeness = self._colors_of(one.class_name) @ vector
                names.append(COLORS10[int(likeness.argmax())])
        return names[: len(objects)]

    def _colors_of(self, name: str) -> Float[np.ndarray, "color feature"]:
        """Unit vectors of the ten colours for a class, computed once and kept."""
        if name not in self._classifiers:
            texts = [
                wording.format(color=color, name=name)
                for color in COLORS10
                for wording in WORDINGS
            ]
            ids = jnp.asarray(self._tokens(texts))
            vectors = self._classify(self._params, ids)
            self._classifiers[name] = np.asarray(vectors)
        return self._classifiers[name]


def crop(
    image: Float[Array | np.ndarray, "height width 3"], detection: Detection, side: int
) -> UInt8[np.ndarray, "side side 3"]:
    """The object's box on grey, its shorter side resized to `side`, the middle cut out."""
    pixels = np.rint(np.asarray(image) * 255).clip(0, 255).astype(np.uint8)
    if detection.mask is not None:
        pixels = np.where(detection.mask[..., None], pixels, GREY)
    x0, y0, x1, y1 = map(round, detection.box)
    picture = Image.fromarray(pixels).crop((x0, y0, x1, y1))
    width, height = (int(side * length / min(picture.size)) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    # As torchvision does, which also rounds halves to the even number.
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))
