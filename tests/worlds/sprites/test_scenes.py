"""Scenes of GenEval records: right when asked to be, wrong as often as asked."""

import functools

import jax
import numpy as np
import pytest

from flowgrpo_jax.data import geneval_grammar
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.worlds.sprites import detector, scenes, world
from flowgrpo_jax.worlds.sprites.prompts import VOCABULARY

TASKS = geneval_grammar.TASKS
SCENES = 300  # of each task


@functools.cache
def drawn(tag: str, noise: float) -> tuple[list[dict], world.Scene]:
    """SCENES records of a task, in turn, and a scene of each."""
    requests = list(geneval_grammar.enumerate_requests(VOCABULARY, tag))
    # A stride through the list: color_attr has more records than there are scenes.
    records = [
        geneval_grammar.record(requests[7 * i % len(requests)]) for i in range(SCENES)
    ]
    rng = np.random.default_rng(TASKS.index(tag))
    return records, scenes.caption_pairs(records, {tag: noise}, rng)


def right(tag: str, noise: float) -> np.ndarray:
    """The benchmark's verdict on each scene, from its picture."""
    records, scene = drawn(tag, noise)
    found = detector.SpriteDetector()(np.asarray(jax.jit(world.render)(scene)))
    return np.array(
        [
            geneval.official_score(record, objects)
            for record, objects in zip(records, found, strict=True)
        ]
    )


@pytest.mark.parametrize("tag", TASKS)
def test_clean_scenes_are_right(tag: str) -> None:
    """Oracle: the detector and GenEval's official check, at least 99 %."""
    assert right(tag, 0.0).mean() >= 0.99


@pytest.mark.parametrize("tag", TASKS)
def test_mistakes_are_wrong(tag: str) -> None:
    """Oracle: the official check. Only a wrong position can be right by accident.

    Two objects far off the axes stand both left of and above each other for GenEval,
    so that a scene drawn for "above" may pass "left of": about 1 in 200. All other
    mistakes change what the record names.
    """
    wrong = 1 - right(tag, 1.0).mean()
    assert wrong >= 0.97 if tag == "position" else wrong == 1.0


@pytest.mark.parametrize("noise", [0.2, 0.6])
@pytest.mark.parametrize("tag", TASKS)
def test_share_of_mistakes(tag: str, noise: float) -> None:
    """Closed form: Binomial(SCENES, noise), within 4 standard deviations."""
    wrong = 1 - right(tag, noise).mean()
    deviation = np.sqrt(noise * (1 - noise) / SCENES)
    slack = 0.01 if tag == "position" else 0.0  # right by accident
    assert abs(wrong - noise) < 4 * deviation + slack


@pytest.mark.parametrize("tag", TASKS)
def test_clean_scenes_hold_what_was_asked(tag: str) -> None:
    """Oracle: the record itself; the objects are those named and no others."""
    records, scene = drawn(tag, 0.0)
    for i, record in enumerate(records):
        asked = sorted(
            (clause["class"], clause.get("color"))
            for clause in record["include"]
            for _ in range(clause["count"])
        )
        # Colours that were left open are not compared.
        held = sorted(
            (world.SHAPES[s], world.COLORS[c] if "color" in tag else None)
            for s, c, here in zip(
                scene.shape[i], scene.color[i], scene.present[i], strict=True
            )
            if here
        )
        assert held == asked


def test_counted_objects_share_a_colour() -> None:
    """Oracle: the rule of the world; "three rings" are three equal rings."""
    records, scene = drawn("counting", 0.0)
    for i, record in enumerate(records):
        assert scene.present[i].sum() == record["include"][0]["count"]
        assert len(set(scene.color[i][scene.present[i]])) == 1


def test_open_colours_take_all_values() -> None:
    """Oracle: uniform draws; every colour is seen, none in more than a third."""
    _, scene = drawn("single_object", 0.0)
    count = np.bincount(scene.color[:, 0], minlength=len(world.COLORS))
    assert count.min() > 0 and count.max() < SCENES / 3


def test_pure_function_of_the_generator() -> None:
    """Oracle: an invariance; the same generator state, the same scenes."""
    records, scene = drawn("color_attr", 0.6)
    rng = np.random.default_rng(TASKS.index("color_attr"))
    again = scenes.caption_pairs(records, {"color_attr": 0.6}, rng)
    for one, other in zip(scene, again, strict=True):
        np.testing.assert_array_equal(one, other)
