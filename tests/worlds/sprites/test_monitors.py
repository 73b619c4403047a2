"""Monitors of reward hacking on pictures made to show one symptom each."""

import jax
import numpy as np
import pytest

from flowgrpo_jax.worlds.sprites import detector, monitors, world

GROUND = np.float32(world.BACKGROUND)


def pictures(colors: list[int], objects: int = 1, shape: int = 0) -> np.ndarray:
    """Images with `objects` circles in the corners, one colour per image."""
    count, slots = len(colors), world.MAX_OBJECTS
    corners = np.float32([[6, 6], [18, 6], [6, 18], [18, 18]])
    scene = world.Scene(
        shape=np.full((count, slots), shape),
        color=np.repeat(np.asarray(colors)[:, None], slots, axis=1),
        center=np.broadcast_to(corners, (count, slots, 2)),
        radius=np.full((count, slots), 3.8, np.float32),
        present=np.broadcast_to(np.arange(slots) < objects, (count, slots)),
    )
    return np.asarray(jax.jit(world.render)(scene))


@pytest.mark.parametrize("objects", [1, 3, 4])
def test_objects(objects: int) -> None:
    """Oracle: the scene. Objects are counted, clean ones are known."""
    found = monitors.measure(pictures([0, 1, 2], objects), np.zeros(3, int))
    assert found["objects"] == objects
    assert found["unknown"] == 0.0


def test_unknown() -> None:
    """Oracle: construction. A bar beside a circle makes half of the objects unknown."""
    images = pictures([0, 1]).copy()
    images[:, 14:17, 10:22] = world.PALETTE["black"]
    found = monitors.measure(images, np.zeros(2, int))
    assert found["objects"] == 2.0
    assert found["unknown"] == 0.5


def test_clean_background() -> None:
    """Closed form: a render has the exact ground off its objects."""
    found = monitors.measure(pictures([0, 1, 2, 3], 4), np.zeros(4, int))
    assert found["background_energy"] < 5e-3
    assert found["background_texture"] < 5e-3


def test_tinted_background() -> None:
    """Closed form: a tint of .06 is energy .06 and has no texture."""
    images = np.tile(GROUND - np.float32(0.06), (3, 24, 24, 1))
    found = monitors.measure(images, np.zeros(3, int))
    assert found["background_energy"] == pytest.approx(0.06, abs=1e-5)
    assert found["background_texture"] == pytest.approx(0.0, abs=1e-5)


def test_dotted_background() -> None:
    """Closed form: dots of .1 on every fourth pixel, each alone in its 3x3 window."""
    images = np.tile(GROUND, (2, 24, 24, 1))
    images[:, ::2, ::2] -= 0.1
    found = monitors.measure(images, np.zeros(2, int))
    assert found["objects"] == 0.0
    assert found["background_energy"] == pytest.approx(0.05, abs=1e-5)
    assert found["background_texture"] == pytest.approx(0.05, rel=0.2)


def test_no_ground_left() -> None:
    """Closed form: without a single ground pixel the deviations are zero."""
    images = np.zeros((1, 24, 24, 3), np.float32)
    found = monitors.measure(images, np.zeros(1, int))
    assert found["unknown"] == 1.0 and found["background_energy"] == 0.0


@pytest.mark.parametrize(
    ("colors", "bits"), [([2] * 4, 0.0), ([0, 1, 2, 3], 2.0), ([5, 6, 5, 6], 1.0)]
)
def test_color_entropy(colors: list[int], bits: float) -> None:
    """Closed form: the entropy of equally frequent colours is their log2."""
    found = monitors.measure(pictures(colors), np.zeros(4, int))
    assert found["color_entropy"] == pytest.approx(bits)


def test_color_entropy_of_free_prompts() -> None:
    """Closed form: images whose prompt fixes the colour do not count."""
    images, free = pictures([0, 1, 2, 3]), np.asarray([True, True, False, False])
    found = monitors.measure(images, np.zeros(4, int), color_free=free)
    assert found["color_entropy"] == pytest.approx(1.0)


def test_diversity() -> None:
    """Closed form: constants apart by .2, .4 and .6 in one prompt, equal in another."""
    values = np.float32([0.1, 0.3, 0.7, 0.5, 0.5])
    images = np.broadcast_to(values[:, None, None, None], (5, 24, 24, 3))
    owner = np.asarray([7, 7, 7, 3, 3])
    assert monitors.diversity(images, owner) == pytest.approx(0.2, abs=1e-6)


def test_diversity_needs_pairs() -> None:
    """Closed form: single samples have no distance."""
    assert np.isnan(monitors.diversity(pictures([0, 1]), np.arange(2)))


def test_found_is_used() -> None:
    """Invariance: handing in the detections changes nothing."""
    images, owner = pictures([0, 1, 2, 3], 3), np.asarray([0, 0, 1, 1])
    found = detector.detect_arrays(images)
    assert monitors.measure(images, owner, found=found) == monitors.measure(
        images, owner
    )
