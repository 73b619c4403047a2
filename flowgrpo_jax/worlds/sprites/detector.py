"""A deterministic detector for the world of sprites, without a network.

Pixels are compared with the background and the palette, connected components become
objects, and each object gets the name of the most similar render in a bank of renders.
The whole batch is processed at once: thousands of images per second on one core.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from flowgrpo_jax.rewards.detection import Detection, Images
from flowgrpo_jax.worlds.sprites import world

UNKNOWN = "unknown"
MIN_AREA = 9.0  # pixels; the smallest triangle of the world covers 18
MAX_SIDE = 16.0  # pixels; 1.5 times the side of the world's largest object
GRID = 12  # an object is resampled to GRID x GRID cells of a square around it
MAX_DISTANCE = 0.16  # rms coverage difference to the nearest render of a known shape
SCORE_AT_LIMIT = 0.3  # GenEval's confidence threshold
FOREIGN = 0.2  # RGB distance from the mixtures of an object's colour with the ground
MAX_FOREIGN_SHARE = 0.1  # of an object's pixels

_GROUND = np.asarray(world.BACKGROUND, np.float32)
_RAYS = np.asarray(list(world.PALETTE.values()), np.float32) - _GROUND
_DEPTHS = np.linalg.norm(_RAYS, axis=-1)
# Neighbours are in the same image only; the leading axis is that of images.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


class Objects(NamedTuple):
    """All objects of a batch of images, ordered by image."""

    image: Int[np.ndarray, "object"]  # index into the batch
    shape: Int[np.ndarray, "object"]  # index into `world.SHAPES`, -1 if unknown
    color: Int[np.ndarray, "object"]  # index into `world.COLORS`
    score: Float[np.ndarray, "object"]  # (0, 1]; below `SCORE_AT_LIMIT` if unknown
    box: Float[np.ndarray, "object xyxy"]  # pixels and fractions of a pixel
    owner: Int[np.ndarray, "image height width"]  # object of each pixel, -1 = ground


class SpriteDetector:
    """The `rewards.detection.Detector` of this world."""

    classes = world.SHAPES
    color_names = world.COLORS

    def __call__(self, images: Images) -> list[list[Detection]]:
        """The objects of each RGB image in [0, 1], with unknown ones among them."""
        objects = detect_arrays(images)
        detections: list[list[Detection]] = [[] for _ in range(len(images))]
        names, boxes = (*world.SHAPES, UNKNOWN), objects.box.tolist()
        for i, image in enumerate(objects.image):
            detections[image].append(
                Detection(
                    class_name=names[objects.shape[i]],
                    score=float(objects.score[i]),
                    box=tuple(boxes[i]),
                    color=world.COLORS[objects.color[i]],
                )
            )
        return detections


def detect_arrays(images: Images) -> Objects:
    """Find and name the objects of a batch of RGB images in [0, 1]."""
    deviation = np.asarray(images, np.float32) - _GROUND
    owner, image = _components(deviation)
    cover, color, foreign = _explain(deviation, owner, image)
    box = _boxes(cover)
    nearest, distance = _nearest_render(_silhouettes(cover, box))
    # An object is also unknown if it has a second colour or is too large: a whole
    # picture in one colour is no square.
    badness = np.maximum(distance / MAX_DISTANCE, foreign / MAX_FOREIGN_SHARE)
    side = (box[:, 2:] - box[:, :2]).max(-1)
    badness = np.where(side > MAX_SIDE, 2.0, badness)
    return Objects(
        image=image,
        shape=np.where(badness <= 1, nearest, -1),
        color=color,
        # Steep, so that clean renders stay above 0.9, which GenEval requires to count.
        score=SCORE_AT_LIMIT ** (badness.clip(max=2) ** 6),
        box=box,
        owner=owner,
    )


def _components(
    deviation: Float[np.ndarray, "image height width channel"],
) -> tuple[Int[np.ndarray, "image height width"], Int[np.ndarray, "object"]]:
    """Object of each pixel (rims included, -1 = ground) and image of each object."""
    cover = np.zeros(deviation.shape[:3], np.float32)
    depth = np.sqrt(np.einsum("nhwc,nhwc->nhw", deviation, deviation))
    far = depth > 0.15
    cover[far] = depth[far] / _DEPTHS[_nearest_color(deviation[far])]
    # A pixel counts if half covered, or if half as deep as pale surroundings.
    peak = ndimage.maximum_filter(cover, size=(1, 5, 5))
    labels, _ = ndimage.label(cover > 0.5 * peak.clip(0.6, 1.0), _NEIGHBOURS)
    area = np.bincount(labels.ravel(), minlength=1)
    area[0] = 0
    keep = area >= MIN_AREA
    owner = np.where(keep, keep.cumsum() - 1, -1)[labels]
    # The rim belongs to the object too: it is grown by one pixel.
    core = owner >= 0
    rim = ndimage.maximum_filter(owner, size=(1, 3, 3))
    at = np.nonzero(core)
    image = np.zeros(int(keep.sum()), np.int64)
    image[owner[at]] = at[0]
    return np.where(core, owner, rim), image


def _explain(
    deviation: Float[np.ndarray, "image height width channel"],
    owner: Int[np.ndarray, "image height width"],
    image: Int[np.ndarray, "object"],
) -> tuple[
    Float[np.ndarray, "object height width"],
    Int[np.ndarray, "object"],
    Float[np.ndarray, "object"],
]:
    """Soft coverage by the object's own colour, the colour, the share of other colours.

    A pixel of the rim is a mixture of object and ground. So the pixels farthest from
    the ground give the colour, and all are projected on the line from ground to it.
    """
    objects = len(image)
    at = np.nonzero(owner >= 0)
    own, ray = owner[at], deviation[at]
    weight = np.sum(ray * ray, axis=-1, dtype=np.float64) ** 4
    total = np.bincount(own, weight, objects)
    core = np.stack(
        [np.bincount(own, weight * ray[:, c], objects) / total for c in range(3)],
        axis=-1,
    ).astype(np.float32)
    part = np.sum(ray * core[own], axis=-1) / np.sum(core * core, axis=-1)[own]
    rest = np.linalg.norm(ray - part[:, None] * core[own], axis=-1)
    inside = np.bincount(own, part > 0.5, objects)
    foreign = np.bincount(own, rest > FOREIGN, objects) / inside.clip(1)
    cover = np.zeros((objects, *owner.shape[1:]), np.float32)
    cover[own, at[1], at[2]] = part.clip(0, 1)
    return cover, _nearest_color(core), foreign


def _nearest_color(
    deviation: Float[np.ndarray, "*pixel channel"],
) -> Int[np.ndarray, "*pixel"]:
    """The palette entry in the closest direction from the ground, however pale."""
    return (deviation @ (_RAYS / _DEPTHS[:, None]).T).argmax(-1)


def _boxes(
    cover: Float[np.ndarray, "object height width"],
) -> Float[np.ndarray, "object xyxy"]:
    """Boxes in pixels; the coverage of the outermost pixels places the edges."""
    edges = []
    for axis in (1, 2):  # over rows: extent along x; over columns: along y
        profile = cover.max(axis)
        inside = profile > 0.5
        first = inside.argmax(-1)
        last = profile.shape[-1] - 1 - inside[:, ::-1].argmax(-1)
        rows = np.arange(len(profile))
        padded = np.pad(profile, ((0, 0), (1, 1)))
        low = first + 1 - padded[rows, first + 1] - padded[rows, first]
        high = last + padded[rows, last + 1] + padded[rows, last + 2]
        edges.append((low, high))
    (x0, x1), (y0, y1) = edges
    return np.stack([x0, y0, x1, y1], axis=-1)


def _silhouettes(
    cover: Float[np.ndarray, "object height width"],
    box: Float[np.ndarray, "object xyxy"],
) -> Float[np.ndarray, "object cell"]:
    """Coverage of GRID x GRID cells of the square around the box, by exact areas."""
    center = (box[:, :2] + box[:, 2:]) / 2
    side = (box[:, 2:] - box[:, :2]).max(-1)
    spread = np.arange(GRID + 1, dtype=np.float32) / GRID - 0.5
    overlaps = []
    for axis, pixels in ((0, cover.shape[2]), (1, cover.shape[1])):
        lines = center[:, axis, None] + side[:, None] * spread
        # The share of each pixel before each line, then that between two lines.
        before = np.clip(lines[..., None] - np.arange(pixels, dtype=np.float32), 0, 1)
        overlaps.append(np.diff(before, axis=1) * (GRID / side[:, None, None]))
    across, down = overlaps
    cells = down @ cover @ across.transpose(0, 2, 1)
    return cells.reshape(len(cover), GRID**2)


def _nearest_render(
    silhouettes: Float[np.ndarray, "object cell"],
) -> tuple[Int[np.ndarray, "object"], Float[np.ndarray, "object"]]:
    """Shape of the most similar render, and the rms coverage difference to it."""
    renders, shapes = _bank()
    # |a - b|^2 of all pairs by one matrix product.
    square = (renders**2).sum(-1) - 2 * silhouettes @ renders.T
    nearest = square.argmin(-1)
    rest = square.min(-1, initial=np.inf) + (silhouettes**2).sum(-1)
    return shapes[nearest], np.sqrt(rest.clip(0) / GRID**2)


@functools.cache
def _bank() -> tuple[Float[np.ndarray, "render cell"], Int[np.ndarray, " render"]]:
    """Silhouettes of every shape at many radii and places between the pixels."""
    radii = np.linspace(3.0, 5.6, 14)
    places = np.stack(np.meshgrid(*[np.arange(0, 1, 0.25)] * 2), -1).reshape(-1, 2)
    shape, radius, place = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(len(world.SHAPES)), radii, np.arange(len(places)), indexing="ij"
        )
    )
    center = (world.SIZE // 2 + places[place]).astype(np.float32)
    slots = world.MAX_OBJECTS  # only the first one is painted
    scene = world.Scene(
        shape=np.repeat(shape[:, None], slots, 1),
        color=np.full((len(shape), slots), world.COLORS.index("black")),
        center=np.repeat(center[:, None], slots, 1),
        radius=np.repeat(radius[:, None].astype(np.float32), slots, 1),
        present=np.broadcast_to(np.arange(slots) == 0, (len(shape), slots)),
    )
    images = np.asarray(jax.jit(world.render)(scene))
    deviation = images - _GROUND
    cover, _, _ = _explain(deviation, *_components(deviation))
    return _silhouettes(cover, _boxes(cover)), shape
