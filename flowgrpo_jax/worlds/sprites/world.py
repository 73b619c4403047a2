"""The world of sprites: 24x24 pictures of a few clear shapes on a light background.

A scene is data (shapes, colours, centres, radii), and only `render` paints it. Units
are pixels, x to the right and y down; the centre of the top left pixel is (0.5, 0.5).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SIZE = 24
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUND = (0.90, 0.90, 0.88)
PALETTE = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.96, 0.80, 0.08),
    "purple": (0.58, 0.18, 0.74),
    "cyan": (0.08, 0.78, 0.86),
    "black": (0.08, 0.08, 0.08),
}
COLORS = tuple(PALETTE)
# Radii shrink with the number of objects so that all of them fit with a clear gap.
# Centres and radii have few values, so that the model's capacity goes to what a prompt
# requests and not to positions between the pixels.
RADII = {1: (4.0, 5.0), 2: (3.5, 4.5), 3: (3.5,), 4: (3.5,)}
LATTICE = 2  # centres are at even pixel coordinates
GAP = 1.6  # pixels between the boxes of two objects, along at least one axis
DOMINANCE = 1.3  # main offset / other offset of two objects in a stated relation


class Scene(NamedTuple):
    """A batch of scenes; objects beyond `present` are ignored."""

    shape: Int[Array | np.ndarray, "scene object"]
    color: Int[Array | np.ndarray, "scene object"]
    center: Float[Array | np.ndarray, "scene object xy"]  # pixels
    radius: Float[Array | np.ndarray, "scene object"]  # pixels
    present: Bool[Array | np.ndarray, "scene object"]


def signed_distance(
    offset: Float[Array, "*pixel xy"], radius: Float[Array, ""]
) -> Float[Array, "*pixel shape"]:
    """Distance in pixels to the rim of every shape in `SHAPES`, negative inside."""
    x, y = offset[..., 0], offset[..., 1]
    far = jnp.sqrt(x * x + y * y + 1e-6)
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.86 * radius
    # Two slanted sides (unit normals) and a base.
    slanted = 0.894 * jnp.abs(x) - 0.447 * y - 0.447 * radius
    triangle = jnp.maximum(slanted, y - 0.86 * radius)
    bar = 0.32 * radius
    upright = jnp.maximum(jnp.abs(x) - bar, jnp.abs(y) - radius)
    lying = jnp.maximum(jnp.abs(y) - bar, jnp.abs(x) - radius)
    cross = jnp.minimum(upright, lying)
    ring = jnp.abs(far - 0.74 * radius) - 0.26 * radius
    return jnp.stack([far - radius, square, triangle, cross, ring], axis=-1)


def render(scene: Scene) -> Float[Array, "scene height width channel"]:
    """Paint scenes with one pixel of antialiasing; RGB in [0, 1]."""
    return jax.vmap(_render_one)(*scene)


def _render_one(shape, color, center, radius, present):
    axis = jnp.arange(SIZE) + 0.5
    pixels = jnp.stack(jnp.meshgrid(axis, axis, indexing="xy"), axis=-1)
    palette = jnp.asarray([PALETTE[name] for name in COLORS])
    image = jnp.broadcast_to(jnp.asarray(BACKGROUND), (SIZE, SIZE, 3))
    for k in range(MAX_OBJECTS):
        distances = signed_distance(pixels - center[k], radius[k])
        distance = jnp.take(distances, shape[k], axis=-1)
        cover = jnp.clip(0.5 - distance, 0.0, 1.0) * present[k]
        image = image + cover[..., None] * (palette[color[k]] - image)
    return image


def separated(
    center: Float[np.ndarray, "*batch object xy"],
    radius: Float[np.ndarray, "*batch object"],
) -> Bool[np.ndarray, "*batch"]:
    """Whether all boxes of a layout keep `GAP` pixels between them."""
    first, second = np.triu_indices(center.shape[-2], k=1)
    offset = np.abs(center[..., first, :] - center[..., second, :]).max(axis=-1)
    return (offset > radius[..., first] + radius[..., second] + GAP).all(axis=-1)


@functools.cache
def layouts(
    objects: int, number: int = 20_000, dominance: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """A fixed pool of layouts: centres [number, objects, 2] and radii [number, objects].

    Rejection sampling is too slow beside a gradient step, so a pool is sampled once and
    scenes choose from it. With `dominance` (of two objects) the x offset is more than
    that many times the y offset; transposing gives the vertical relations.
    """
    rng = np.random.default_rng((objects, number, int(dominance * 100)))
    centers, radii, accepted = [], [], 0
    while accepted < number:
        radius = rng.choice(RADII[objects], (200_000, objects))
        cells = np.floor((SIZE - 2 * (radius + 0.5)) / LATTICE)[..., None]
        first = np.ceil((radius + 0.5) / LATTICE)[..., None]
        steps = np.floor(rng.random((*radius.shape, 2)) * (cells + 1))
        center = np.minimum((first + steps) * LATTICE, SIZE - LATTICE * first)
        keep = separated(center, radius)
        if dominance:
            offset = np.abs(center[:, 0] - center[:, 1])
            keep &= offset[:, 0] > dominance * offset[:, 1]
        centers.append(center[keep])
        radii.append(radius[keep])
        accepted += int(keep.sum())
    center, radius = np.concatenate(centers)[:number], np.concatenate(radii)[:number]
    return center.astype(np.float32), radius.astype(np.float32)
