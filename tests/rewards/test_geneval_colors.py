"""Colours named after detection: who is asked for, and what the score makes of it."""

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.detection import ColorNamer, Detection
from flowgrpo_jax.rewards.geneval import GenEval

BOX = (0.0, 0.0, 4.0, 4.0)
IMAGES = np.zeros((3, 8, 8, 3), np.float32)


class Namer:
    """Everything is red but the dogs; remembers what it was asked."""

    asked: list

    def __call__(self, images, objects):
        self.asked = [(image, one.class_name, one.score) for image, one in objects]
        return ["blue" if one.class_name == "dog" else "red" for _, one in objects]


def prompt(tag, *clauses):
    return Prompt("", {"tag": tag, "include": list(clauses)})


def test_only_colours_that_decide_are_named():
    """Oracle: GenEval's rule, which classifies the `count` best boxes of a class."""
    found = [
        [Detection("cup", s, BOX) for s in (0.5, 0.9, 0.2)]
        + [Detection("dog", 1.0, BOX)]
    ] * 2 + [[Detection("dog", 0.8, BOX)]]
    namer = Namer()
    assert isinstance(namer, ColorNamer)
    reward = GenEval(lambda images: found, colors=namer)
    prompts = [
        prompt("colors", {"class": "cup", "count": 1, "color": "red"}),
        prompt("single_object", {"class": "cup", "count": 1}),
        prompt("colors", {"class": "dog", "count": 1, "color": "red"}),
    ]
    result = reward(IMAGES, prompts)
    assert namer.asked == [(0, "cup", 0.9), (2, "dog", 0.8)]
    # A second cup is free in the official score; strictly it is one too many.
    assert result["accuracy"].tolist() == [1, 1, 0]
    assert result["strict_accuracy"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(result["geneval"], [0, 0, 0.5])
