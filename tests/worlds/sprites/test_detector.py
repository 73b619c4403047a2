"""The detector against scenes whose contents are known."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from scipy import ndimage

from flowgrpo_jax.rewards.detection import Detector
from flowgrpo_jax.worlds.sprites import detector, world

NUMBER = 600
RENDER = jax.jit(world.render)
Distortion = Callable[[np.ndarray], np.ndarray]


def clean(images: np.ndarray) -> np.ndarray:
    return images


def noisy(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(7).standard_normal(images.shape)
    return (images + 0.03 * noise).clip(0, 1).astype(np.float32)


def soft(images: np.ndarray) -> np.ndarray:
    blurred = ndimage.uniform_filter(images, (1, 3, 3, 1), mode="nearest")
    return (0.7 * images + 0.3 * blurred).astype(np.float32)


def soft_and_noisy(images: np.ndarray) -> np.ndarray:
    return noisy(soft(images))


DISTORTIONS = [(clean, 0.99), (noisy, 0.98), (soft, 0.98), (soft_and_noisy, 0.97)]


@functools.cache
def scenes(objects: int, alike: bool = False, dominance: float = 0.0) -> world.Scene:
    """Random scenes; `alike` objects share shape and colour as in counting.

    Samples do not keep to the lattice: a scene moves and shrinks by fractions of a pixel.
    """
    rng = np.random.default_rng(objects)
    center, radius = world.layouts(objects, dominance=dominance)
    pick = rng.integers(len(center), size=NUMBER)
    center = center[pick] + rng.uniform(-0.5, 0.5, (NUMBER, 1, 2)).astype(np.float32)
    radius = radius[pick] * rng.uniform(0.93, 1, (NUMBER, 1)).astype(np.float32)
    unused = world.MAX_OBJECTS - objects
    shape = rng.integers(len(world.SHAPES), size=(NUMBER, world.MAX_OBJECTS))
    color = rng.integers(len(world.COLORS), size=(NUMBER, world.MAX_OBJECTS))
    if alike:
        shape[:], color[:] = shape[:, :1], color[:, :1]
    return world.Scene(
        shape,
        color,
        np.pad(center, ((0, 0), (0, unused), (0, 0)), mode="edge"),
        np.pad(radius, ((0, 0), (0, unused)), mode="edge"),
        np.arange(world.MAX_OBJECTS)[None].repeat(NUMBER, 0) < objects,
    )


@functools.cache
def pictures(objects: int, alike: bool = False, dominance: float = 0.0) -> np.ndarray:
    return np.asarray(RENDER(scenes(objects, alike, dominance)))


def contents(found: detector.Objects, image: int) -> list[tuple[int, int]]:
    mine = found.image == image
    return sorted(zip(found.shape[mine], found.color[mine], strict=True))


@pytest.mark.parametrize(("distort", "wanted"), DISTORTIONS)
@pytest.mark.parametrize("shape", range(len(world.SHAPES)))
def test_single_class(shape: int, distort: Distortion, wanted: float) -> None:
    """Oracle: the scene. Every class on its own, colour included."""
    scene = scenes(1)._replace(shape=np.full((NUMBER, world.MAX_OBJECTS), shape))
    found = detector.detect_arrays(distort(np.asarray(RENDER(scene))))
    truth = [[(shape, color)] for color in scene.color[:, 0]]
    right = [contents(found, i) == truth[i] for i in range(NUMBER)]
    assert np.mean(right) >= wanted


@pytest.mark.parametrize(("distort", "wanted"), DISTORTIONS)
@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "alike"])
@pytest.mark.parametrize("objects", [2, 3, 4])
def test_contents(
    objects: int, alike: bool, distort: Distortion, wanted: float
) -> None:
    """Oracle: the scene. Two objects, counting and attribute binding at once."""
    scene = scenes(objects, alike)
    found = detector.detect_arrays(distort(pictures(objects, alike)))
    right = [
        contents(found, i)
        == sorted(zip(scene.shape[i, :objects], scene.color[i, :objects], strict=True))
        for i in range(NUMBER)
    ]
    assert np.mean(right) >= wanted


def relations(first: np.ndarray, second: np.ndarray) -> set[str]:
    """GenEval's rule: where the second box is, seen from the first."""
    low, high = np.stack([first[:2], second[:2]]), np.stack([first[2:], second[2:]])
    offset = np.diff((low + high) / 2, axis=0)[0]
    revised = np.maximum(np.abs(offset) - 0.1 * (high - low).sum(0), 0)
    x, y = revised * np.sign(offset) / np.linalg.norm(offset)
    tests = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, cosine in tests.items() if cosine > 0.5}


@pytest.mark.parametrize(("distort", "wanted"), DISTORTIONS)
def test_position(distort: Distortion, wanted: float) -> None:
    """Oracle: the scene's true boxes and stated relation, under GenEval's rule."""
    scene = scenes(2, dominance=world.DOMINANCE)
    found = detector.detect_arrays(distort(pictures(2, dominance=world.DOMINANCE)))
    right = []
    for i in range(NUMBER):
        boxes = found.box[found.image == i]
        shapes = found.shape[found.image == i][boxes[:, 0].argsort()]
        boxes = boxes[boxes[:, 0].argsort()]
        order = scene.center[i, :2, 0].argsort()
        right.append(
            len(boxes) == 2
            and (shapes == scene.shape[i, order]).all()
            and "right of" in relations(boxes[0], boxes[1])
        )
    assert np.mean(right) >= wanted


def test_boxes() -> None:
    """Closed form: a circle's box is its centre plus and minus its radius."""
    scene = scenes(1)._replace(shape=np.zeros((NUMBER, world.MAX_OBJECTS), int))
    found = detector.detect_arrays(np.asarray(RENDER(scene)))
    center, radius = scene.center[:, 0], scene.radius[:, :1]
    truth = np.concatenate([center - radius, center + radius], axis=-1)
    assert np.abs(found.box - truth).max() < 0.35


def test_nothing_to_find() -> None:
    """Closed form: an empty ground has no objects, with noise or without."""
    ground = np.broadcast_to(np.float32(world.BACKGROUND), (200, 24, 24, 3))
    for images in (ground, noisy(ground)):
        assert len(detector.detect_arrays(images).image) == 0
    assert detector.SpriteDetector()(ground[:2]) == [[], []]


def test_uniform_noise() -> None:
    """Oracle: construction. Noise holds something, but no known shape."""
    images = np.random.default_rng(0).random((300, 24, 24, 3)).astype(np.float32)
    found = detector.detect_arrays(images)
    assert len(found.image) >= 300
    assert (found.shape == -1).all()
    assert (found.score > 0).all()
    assert found.score.max() < detector.SCORE_AT_LIMIT


def test_two_colours_are_unknown() -> None:
    """Oracle: construction. One outline in two halves of different colour."""
    scene = scenes(1)
    other = scene._replace(color=(scene.color + 1) % len(world.COLORS))
    left = np.arange(world.SIZE)[:, None] < scene.center[:, 0, 0, None, None, None]
    images = np.where(left, pictures(1), np.asarray(RENDER(other)))
    found = detector.detect_arrays(images)
    assert len(found.image) == NUMBER
    assert (found.shape == -1).mean() >= 0.99


def test_touching_shapes_are_unknown() -> None:
    """Oracle: construction. Two shapes that overlap by a third of their width."""
    scene = scenes(2)
    center = scene.center.copy()
    center[:, 0] = center[:, 0].clip(8.0, 16.0)
    center[:, 1] = center[:, 0] + np.float32([4.5, 1.5])
    images = np.asarray(RENDER(scene._replace(center=center)))
    found = detector.detect_arrays(images)
    assert (np.bincount(found.image, minlength=NUMBER) >= 1).all()
    assert (found.shape == -1).mean() >= 0.98


def test_strange_shape_is_unknown() -> None:
    """Oracle: construction. Diamonds are no shape of this world."""
    axis = np.arange(world.SIZE) + 0.5
    x, y = np.meshgrid(axis, axis)
    rng = np.random.default_rng(0)
    center = rng.uniform(8, 16, (NUMBER, 2, 1, 1))
    radius = rng.uniform(3.5, 5.4, (NUMBER, 1, 1))
    distance = (abs(x - center[:, 0]) + abs(y - center[:, 1]) - radius) / np.sqrt(2)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    images = (1 - cover) * world.BACKGROUND + cover * world.PALETTE["blue"]
    found = detector.detect_arrays(images)
    assert len(found.image) == NUMBER
    assert (found.shape == -1).mean() >= 0.99


def test_flood_is_unknown() -> None:
    """Closed form: a picture of a single colour is no square."""
    images = np.zeros((1, world.SIZE, world.SIZE, 3), np.float32)
    found = detector.detect_arrays(images)
    assert found.shape.tolist() == [-1]
    np.testing.assert_allclose(found.box, [[0, 0, world.SIZE, world.SIZE]])


def test_protocol() -> None:
    """Invariance: the detections are the arrays, one list per image, in pixels."""
    images = pictures(3)[:20]
    found = detector.detect_arrays(images)
    lists = detector.SpriteDetector()(images)
    flat = [detection for image in lists for detection in image]
    assert isinstance(detector.SpriteDetector(), Detector)
    assert [len(image) for image in lists] == np.bincount(found.image).tolist()
    assert [d.class_name for d in flat] == [world.SHAPES[k] for k in found.shape]
    assert [d.color for d in flat] == [world.COLORS[k] for k in found.color]
    np.testing.assert_allclose([d.box for d in flat], found.box)
    np.testing.assert_allclose([d.score for d in flat], found.score)
    assert all(detection.score > 0.9 for detection in flat)


def test_owner_covers_the_objects() -> None:
    """Invariance: off the owners there is nothing but ground, and ids are in order."""
    images = pictures(4)[:100]
    found = detector.detect_arrays(images)
    ground = images[found.owner < 0]
    assert np.abs(ground - np.float32(world.BACKGROUND)).max() < 0.05
    for i, image in enumerate(found.owner):
        assert (found.image[np.unique(image[image >= 0])] == i).all()


def test_batch_does_not_matter() -> None:
    """Invariance: an image gives the same objects alone and in a batch."""
    images = pictures(3)[:30]
    together = detector.detect_arrays(images)
    for i in range(30):
        alone = detector.detect_arrays(images[i : i + 1])
        mine = together.image == i
        np.testing.assert_array_equal(alone.shape, together.shape[mine])
        np.testing.assert_allclose(alone.box, together.box[mine], atol=1e-5)
        np.testing.assert_allclose(alone.score, together.score[mine], atol=1e-4)
