"""The painter and the layouts of the embedded world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.worlds.sprites import world

RENDER = jax.jit(world.render)


def one(shape: int, color: int, center: tuple, radius: float) -> world.Scene:
    """A scene of a single object."""
    slots = world.MAX_OBJECTS
    return world.Scene(
        shape=np.full((1, slots), shape),
        color=np.full((1, slots), color),
        center=np.full((1, slots, 2), center, np.float32),
        radius=np.full((1, slots), radius, np.float32),
        present=np.arange(slots)[None] == 0,
    )


def covered(image: np.ndarray, color: int) -> float:
    """Pixels covered by an object, by inverting the mixture with the ground."""
    ground = np.asarray(world.BACKGROUND)
    ray = np.asarray(world.PALETTE[world.COLORS[color]]) - ground
    return float(((image - ground) @ ray / (ray @ ray)).sum())


def test_empty_scene_is_ground() -> None:
    """Closed form: without a present object every pixel is `BACKGROUND`."""
    scene = one(0, 0, (12.0, 12.0), 5.0)._replace(present=np.zeros((1, 4), bool))
    image = np.asarray(RENDER(scene))
    assert image.shape == (1, world.SIZE, world.SIZE, 3)
    np.testing.assert_array_equal(
        image, np.broadcast_to(np.float32(world.BACKGROUND), image.shape)
    )


@pytest.mark.parametrize("color", range(len(world.COLORS)))
def test_inside_has_the_colour(color: int) -> None:
    """Closed form: a pixel deep inside a square has exactly the palette's colour."""
    image = np.asarray(RENDER(one(1, color, (9.0, 15.0), 4.0)))
    np.testing.assert_allclose(
        image[0, 14, 8], world.PALETTE[world.COLORS[color]], atol=1e-6
    )


# Areas over radius^2 of the outlines as drawn in `signed_distance`.
AREAS = {
    "circle": np.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 0.5 * 1.86 * 1.86,
    "cross": 2 * (2 * 0.64) - 0.64**2,
    "ring": np.pi * (1 - 0.48**2),
}


@pytest.mark.parametrize("shape", world.SHAPES)
def test_area(shape: str) -> None:
    """Closed form: the painted coverage is the area of the outline."""
    radius, black = 5.0, world.COLORS.index("black")
    scene = one(world.SHAPES.index(shape), black, (12.3, 11.6), radius)
    area = covered(np.asarray(RENDER(scene))[0].astype(float), black)
    assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.03)


@pytest.mark.parametrize("shape", range(len(world.SHAPES)))
def test_translation(shape: int) -> None:
    """Invariance: moving an object by whole pixels moves the picture."""
    here = np.asarray(RENDER(one(shape, 2, (9.3, 10.6), 4.0)))
    there = np.asarray(RENDER(one(shape, 2, (12.3, 8.6), 4.0)))
    np.testing.assert_allclose(np.roll(here, (-2, 3), (1, 2)), there, atol=1e-5)


def test_signed_distance() -> None:
    """Closed form: distances of the centre and of a point 2 px right of a radius 5."""
    points = jnp.asarray([[0.0, 0.0], [7.0, 0.0]])
    distance = world.signed_distance(points, jnp.asarray(5.0))
    center, right = np.asarray(distance)
    np.testing.assert_allclose(center, [-5.0, -4.3, -2.235, -1.6, 2.4], atol=2e-3)
    np.testing.assert_allclose(right, [2.0, 2.7, 4.023, 2.0, 2.0], atol=2e-3)


def test_y_points_down() -> None:
    """Closed form: a triangle's base is its lowest and widest row."""
    black = world.COLORS.index("black")
    image = np.asarray(RENDER(one(2, black, (12.0, 12.0), 5.0)))[0, ..., 0]
    width = (image < 0.5).sum(1)
    assert width[14] > width[9] > 0
    assert width[17:].sum() == 0


@pytest.mark.parametrize("objects", range(1, world.MAX_OBJECTS + 1))
def test_layouts_fit(objects: int) -> None:
    """Closed form: inside the picture, on the lattice, boxes apart by `GAP`."""
    center, radius = world.layouts(objects)
    assert center.shape == (len(radius), objects, 2)
    assert set(np.unique(radius)) <= set(world.RADII[objects])
    assert (center % world.LATTICE == 0).all()
    assert (center >= radius[..., None]).all()
    assert (center <= world.SIZE - radius[..., None]).all()
    if objects > 1:
        first, second = np.triu_indices(objects, k=1)
        apart = np.abs(center[:, first] - center[:, second]).max(-1)
        assert (apart > radius[:, first] + radius[:, second] + world.GAP - 1e-5).all()


def test_layouts_dominance() -> None:
    """Closed form: with `dominance` the x offset leads; the pool is reproducible."""
    center, _ = world.layouts(2, dominance=world.DOMINANCE)
    offset = np.abs(center[:, 0] - center[:, 1])
    assert (offset[:, 0] >= world.DOMINANCE * offset[:, 1] - 1e-5).all()
    again, _ = world.layouts.__wrapped__(2, dominance=world.DOMINANCE)
    np.testing.assert_array_equal(center, again)


def test_separated() -> None:
    """Closed form: a gap along one axis is enough, and it must exceed `GAP`."""
    radius = np.full((3, 2), 3.0)
    far, near = 6.0 + world.GAP + 0.01, 6.0 + world.GAP - 0.01
    second = np.asarray([[far, 0.0], [near, near], [1.0, far]])
    center = np.stack([np.zeros((3, 2)), second], axis=1)
    np.testing.assert_array_equal(world.separated(center, radius), [True, False, True])
