"""From Mask2Former's queries to instances: score, class, box and mask.

The rules are those of transformers' `post_process_instance_segmentation` (and of mmdet,
which GenEval runs): the best pairs of query and class, each pair's probability times
the mean certainty of its mask, and the box around the mask's pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from flowgrpo_jax.models.mask2former.network import Segmentation
from flowgrpo_jax.models.mask2former.pixels import Size, resize

MASK_SIZE = (384, 384)  # where masks are cut off, whatever the image's size


@struct.dataclass
class Instances:
    """As many as there are queries, the most probable class first; most are noise.

    An instance without a pixel has the score 0. Boxes are (x0, y0, x1, y1) in pixels
    of the image, the far edges exclusive. Masks belong to queries, not to instances.
    """

    score: Float[Array | np.ndarray, "image instance"]
    label: Int[Array | np.ndarray, "image instance"]
    query: Int[Array | np.ndarray, "image instance"]
    box: Int[Array | np.ndarray, "image instance 4"]
    masks: UInt8[
        Array | np.ndarray, "image query row byte"
    ]  # `MASK_SIZE`, eight pixels a byte


def find_instances(found: Segmentation, size: Size) -> Instances:
    """Instances of images that are `size` (height, width) pixels large."""
    queries = found.mask_logits.shape[1]
    classes = found.class_logits.shape[-1] - 1
    probability = jax.nn.softmax(found.class_logits.astype(jnp.float32), axis=-1)
    flat = probability[..., :-1].reshape(len(probability), -1)
    score, best = jax.lax.top_k(flat, queries)
    query, label = best // classes, best % classes

    logits = jnp.moveaxis(
        resize(jnp.moveaxis(found.mask_logits, 1, -1), MASK_SIZE), -1, 1
    )
    inside = logits > 0
    certainty = jnp.where(inside, jax.nn.sigmoid(logits), 0).sum((-2, -1))
    certainty = certainty / (inside.sum((-2, -1)) + 1e-6)
    box, empty = _boxes(inside, size)
    certainty = jnp.where(empty, 0, certainty)
    return Instances(
        score=score * jnp.take_along_axis(certainty, query, axis=1),
        label=label,
        query=query,
        box=jnp.take_along_axis(box, query[..., None], axis=1),
        masks=jnp.packbits(inside, axis=-1),
    )


def unpack_mask(
    packed: UInt8[np.ndarray, "row byte"], size: Size
) -> Bool[np.ndarray, "height width"]:
    """One mask at the image's size, the nearest of its pixels."""
    mask = np.unpackbits(packed, axis=-1).astype(bool)
    rows, columns = map(_nearest, size, MASK_SIZE)
    return mask[rows][:, columns]


def _nearest(pixels: int, source: int) -> Int[np.ndarray, " pixel"]:
    """The pixel of `source` that each of `pixels` shows: torch's "nearest"."""
    scale = np.float32(source) / np.float32(pixels)
    return np.minimum(np.arange(pixels, dtype=np.float32) * scale, source - 1).astype(
        int
    )


def _boxes(
    inside: Bool[Array, "image query row column"], size: Size
) -> tuple[Int[Array, "image query 4"], Bool[Array, "image query"]]:
    """Box around each mask at the image's size, and whether there is nothing in it."""
    edges = []
    rows, columns = map(_nearest, size, MASK_SIZE)
    shown = np.zeros(MASK_SIZE, bool)
    shown[np.ix_(rows, columns)] = True
    for axis, index in ((-2, columns), (-1, rows)):
        line = jnp.any(inside & shown, axis=axis)[..., index]
        edges += [line.argmax(-1), len(index) - line[..., ::-1].argmax(-1)]
    x0, x1, y0, y1 = edges
    return jnp.stack([x0, y0, x1, y1], axis=-1), ~line.any(-1)
