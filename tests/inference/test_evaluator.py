"""Scores of images that were made and judged in parts."""

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.inference import evaluator


def test_measurements_come_back_in_order():
    """Oracle: by hand; each image has the number of its place."""
    parts = [
        (np.array([3, 0]), {"a": np.array([3.0, 0.0])}),
        (np.array([1, 4, 2]), {"a": np.array([1.0, 4.0, 2.0])}),
    ]
    np.testing.assert_array_equal(evaluator.in_order(parts)["a"], np.arange(5.0))


def test_a_mean_over_parts_is_that_over_images():
    """Oracle: by hand; what a part cannot tell is left to the others."""
    nan = float("nan")
    parts = [(3, {"a": 1.0, "b": nan, "c": nan}), (1, {"a": 5.0, "b": 2.0, "c": nan})]
    found = evaluator.mean(parts)
    assert found["a"] == 2.0 and found["b"] == 2.0 and np.isnan(found["c"])


def test_every_prompt_has_its_means():
    """Oracle: by hand; prompts without an image are left out."""
    prompts = [Prompt("a", {"tag": "x"}), Prompt("b"), Prompt("c")]
    measured = {"mine": np.array([0.25, 1.0, 0.75])}
    assert evaluator.by_prompt(measured, prompts, np.array([0, 2, 0])) == [
        {"prompt": "a", "tag": "x", "images": 2, "scores": {"mine": 0.5}},
        {"prompt": "c", "tag": "", "images": 1, "scores": {"mine": 1.0}},
    ]
