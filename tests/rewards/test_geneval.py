"""GenEval's scores on detections written by hand.

Boxes are 10 pixels wide in a 100-pixel image: an offset must exceed 2 pixels.
"""

import numpy as np
import pytest

from flowgrpo_jax.data.geneval_grammar import Item, Request, record
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.detection import Detection, Detector
from flowgrpo_jax.rewards.geneval import (
    GenEval,
    Rules,
    by_task,
    continuous_score,
    detected,
    official_score,
    overall,
    relations,
)


def _box(name, x=50.0, y=50.0, color=None, score=0.95, size=10.0):
    half = size / 2
    return Detection(name, score, (x - half, y - half, x + half, y + half), color)


SINGLE = record(Request("single_object", (Item("cat"),)))
TWO = record(Request("two_object", (Item("cat"), Item("dog"))))
THREE = record(Request("counting", (Item("cat", 3),)))
COLOR = record(Request("colors", (Item("cat", 1, "red"),)))
LEFT = record(Request("position", (Item("cat"), Item("dog")), "left of"))
PAIR = record(Request("color_attr", (Item("cat", 1, "red"), Item("dog", 1, "blue"))))

CAT, DOG = _box("cat", x=20.0), _box("dog", x=80.0)


@pytest.mark.parametrize(
    ("request_", "found", "score", "strict", "official"),
    [
        (SINGLE, [CAT], 1.0, 1, 1),
        (SINGLE, [], 0.0, 0, 0),
        (SINGLE, [DOG], 0.0, 0, 0),
        (SINGLE, [CAT, DOG], 1.0, 1, 1),  # other classes are free
        (SINGLE, [CAT, CAT], 0.0, 0, 1),  # more of the class: only strict minds
        (SINGLE, [CAT, CAT, CAT], -1.0, 0, 1),  # want 1, found 3
        (TWO, [CAT, DOG], 1.0, 1, 1),
        (TWO, [DOG], 0.5, 0, 0),
        (THREE, [CAT] * 3, 1.0, 1, 1),
        (THREE, [CAT] * 2, 2 / 3, 0, 0),
        (THREE, [CAT] * 4, 2 / 3, 0, 0),  # the exclude clause fails official
        (THREE, [CAT] * 7, -1 / 3, 0, 0),
        (COLOR, [_box("cat", color="red")], 1.0, 1, 1),
        (COLOR, [_box("cat", color="blue")], 0.5, 0, 0),
        (COLOR, [_box("cat")], 0.5, 0, 0),
        (COLOR, [], 0.0, 0, 0),
        (PAIR, [_box("cat", color="red"), _box("dog", color="blue")], 1.0, 1, 1),
        (PAIR, [_box("cat", color="blue"), _box("dog", color="red")], 0.5, 0, 0),
        (PAIR, [_box("cat", color="red")], 0.5, 0, 0),
        (LEFT, [CAT, DOG], 1.0, 1, 1),
        (LEFT, [_box("cat", x=80.0), _box("dog", x=20.0)], 2 / 3, 0, 0),
        (LEFT, [DOG], 1 / 3, 0, 0),  # the second object is missing
        (LEFT, [CAT], 1 / 3, 0, 0),  # the target is missing
        (LEFT, [], 0.0, 0, 0),
    ],
)
def test_scores(request_, found, score, strict, official):
    """Oracle: marks added by hand (the values of the reference server but 2/3)."""
    assert continuous_score(request_, found) == pytest.approx((score, strict))
    assert official_score(request_, found) == official


@pytest.mark.parametrize(
    ("found", "score"),
    [
        ([CAT, DOG], 1.0),  # (1 + 1 + 1) / 3
        ([_box("cat", x=80.0), _box("dog", x=20.0)], 0.75),  # (1 + 1 + 0 + 1) / 4
        ([DOG], 1 / 3),  # (1 + 0 + 0) / 3
        ([CAT], 1 / 3),  # (0 + 1 + 0) / 3
    ],
)
def test_defect_of_the_reference_server(found, score):
    """Oracle: the values that the reference server gives, failed positions too."""
    result, strict = continuous_score(LEFT, found, failed_position_scores=True)
    assert result == pytest.approx(score)
    assert strict == (score == 1.0)


def test_thresholds():
    """Oracle: .3 in general, .9 when counting, both exclusive; 16 of a class."""
    found = [_box("cat", score=score) for score in (0.3, 0.31, 0.9, 0.91)]
    assert len(detected(SINGLE, found)["cat"]) == 3
    assert len(detected(THREE, found)["cat"]) == 1
    assert len(detected(SINGLE, found, Rules(threshold=0.5))["cat"]) == 2
    assert len(detected(SINGLE, [CAT] * 20)["cat"]) == 16


def test_official_score_looks_at_the_most_confident():
    """Oracle: the benchmark's rule: the best cat decides, in any order."""
    red = _box("cat", color="red", score=0.9)
    blue = _box("cat", color="blue", score=0.8)
    assert official_score(COLOR, [blue, red]) == 1
    assert official_score(COLOR, [red, _box("cat", color="blue", score=0.99)]) == 0
    # Both cats are counted by the continuous score: 1 - 1 = 0, colour 0.
    assert continuous_score(COLOR, [blue, red]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 50, {"left of"}),
        (80, 50, {"right of"}),
        (50, 20, {"above"}),  # y points down
        (50, 80, {"below"}),
        (20, 80, {"left of", "below"}),
        (50, 50, set()),
        (48, 50, set()),  # within .1 * (10 + 10)
        (46, 50, set()),  # beyond by 2 of 4: -.5, not below it
        (45.9, 50, {"left of"}),
    ],
)
def test_relations(x, y, expected):
    """Oracle: the benchmark's rule by hand, at its edges too."""
    assert relations(_box("a", x=float(x), y=float(y)), _box("b")) == expected


def test_relations_are_antisymmetric():
    """Oracle: swapping two random boxes swaps left/right and above/below."""
    opposite = {"left of": "right of", "above": "below"}
    opposite |= {b: a for a, b in opposite.items()}
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (
            _box(
                "x", *map(float, rng.uniform(10, 90, 2)), size=float(rng.uniform(5, 60))
            )
            for _ in range(2)
        )
        assert relations(a, b) == {opposite[r] for r in relations(b, a)}


def test_overall_weighs_tasks_not_images():
    """Oracle: (1 + 0) / 2 for two images of one task and one of another.

    A prompt without a task counts in none.
    """
    prompts = [Prompt(r["prompt"], r) for r in (SINGLE, SINGLE, COLOR)]
    accuracy = by_task(prompts, np.array([1, 1, 0], np.float32))
    assert accuracy == {"single_object": 1.0, "colors": 0.0}
    assert overall(accuracy) == 0.5
    prompts[1] = Prompt("without a task")
    assert by_task(prompts, np.array([1, 0, 0], np.float32)) == accuracy


class _Fixed:
    """A detector that finds in every image what it was told."""

    def __init__(self, found):
        self.found = found

    def __call__(self, images):
        return self.found


def _reward(requests, found, **options):
    images = np.zeros((len(found), 8, 8, 3), np.float32)
    prompts = [Prompt(r["prompt"], r) for r in requests]
    detector = _Fixed(found)
    assert isinstance(detector, Detector)
    return GenEval(detector, **options)(images, prompts)


def test_reward_measures_every_image():
    """Oracle: by hand for an image right, one crowded and one empty."""
    result = _reward([SINGLE, SINGLE, TWO], [[CAT], [CAT, DOG, DOG], []])
    expected = {
        "geneval": [1, 1, 0],
        "accuracy": [1, 1, 0],
        "strict_accuracy": [1, 1, 0],
        "objects": [1, 3, 0],
        "exact_count": [1, 0, 0],
    }
    assert set(result) == set(expected)
    for name, values in expected.items():
        assert result[name].dtype == np.float32
        np.testing.assert_array_equal(result[name], np.float32(values))


def test_extra_object_penalty():
    """Oracle: score / (1 + .35 * extra) when positive; others untouched."""
    requests = [SINGLE, SINGLE, SINGLE, TWO]
    found = [[CAT], [CAT, DOG, DOG], [CAT, CAT, CAT], [CAT]]
    result = _reward(requests, found, extra_object_penalty=0.35)
    np.testing.assert_allclose(result["geneval"], [1, 1 / 1.7, -1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(result["accuracy"], [1, 1, 1, 0])
    with pytest.raises(UserError, match="^reward: geneval: extra_object_penalty -1.0"):
        _reward([SINGLE], [[CAT]], extra_object_penalty=-1.0)


def test_reward_passes_its_options_on():
    """Oracle: .75 with the reference server's defect."""
    wrong = [_box("cat", x=80.0), _box("dog", x=20.0)]
    result = _reward([LEFT], [wrong], failed_position_scores=True)
    assert result["geneval"] == [0.75]


def test_a_prompt_without_a_record():
    """Oracle: the message names the key, the prompt and the remedy."""
    with pytest.raises(UserError, match="^reward: geneval: prompt 'a cat' has no"):
        GenEval(_Fixed([[]]))(np.zeros((1, 8, 8, 3), np.float32), [Prompt("a cat")])
