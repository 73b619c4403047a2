"""Records of GenEval prompts: every one of the grammar is right, every damage is told."""

import pytest

from flowgrpo_jax.data.geneval_grammar import COCO, TASKS, enumerate_requests, record
from flowgrpo_jax.rewards.geneval_records import check
from flowgrpo_jax.worlds.sprites.detector import SpriteDetector

CAT = {"class": "cat", "count": 1}
DOG = {"class": "dog", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize("task", TASKS)
def test_what_the_grammar_says_is_right(task):
    """Oracle: the generator of the benchmark's own prompts."""
    for number, request in enumerate(enumerate_requests(COCO, task)):
        if number % 97 == 0:
            check(record(request), COCO.classes, COCO.colors)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([{"class": "cat"}], r"has include\[0\] without count"),
        ([{"count": 1}], r"has include\[0\] without class"),
        ([CAT | {"count": "1"}], r"include\[0\].count '1': must be a whole number"),
        ([CAT | {"count": 1.0}], r"include\[0\].count 1.0: must be a whole number"),
        ([CAT | {"count": 0}], r"include\[0\].count 0: must be a whole number"),
        ([CAT | {"count": -1}], r"include\[0\].count -1: must be a whole number"),
        ([CAT | {"count": True}], r"include\[0\].count True: must be a whole number"),
        ([CAT | {"count": None}], r"include\[0\].count None: must be a whole number"),
        ([CAT, CAT | {"class": 3}], r"include\[1\].class 3: must be a text"),
        ([CAT | {"class": ""}], r"include\[0\].class '': must be a text"),
        ([CAT | {"class": ["cat"]}], r"include\[0\].class \['cat'\]: must be a text"),
        ([CAT | {"class": "mouse"}], "does not know it: must be one of .*computer"),
        ([CAT | {"class": "unicorn"}], "does not know it: must be one of "),
        ([CAT | {"color": "rde"}], "'rde': the detector does not know it.*red"),
        ([CAT | {"color": None}], r"include\[0\].color None: must be a text"),
        ([CAT | {"colour": "red"}], r"include\[0\].colour: is not followed"),
        ([CAT, DOG | {"position": "left of"}], r"\[1\].position 'left of': must be"),
        ([CAT, DOG | {"position": ["left", 0]}], r"\[1\].position \['left', 0\]: must"),
        ([CAT, DOG | {"position": ["left of"]}], r"\[1\].position \['left of'\]: must"),
        ([CAT, DOG | {"position": ["left of", "0"]}], r"\[1\].position .*: must be"),
        ([CAT, DOG | {"position": ["left of", 0.0]}], r"\[1\].position .*: must be"),
        ([CAT, DOG | {"position": ["left of", -1]}], "must name an earlier clause"),
        ([CAT, DOG | {"position": ["left of", 1]}], "must name an earlier clause"),
        ([DOG, CAT], "must name an earlier clause than 0"),
        ([CAT, DOG | {"position": [["left of"], 0]}], r"\[1\].position .*: must be"),
        (["cat"], r"has include\[0\] 'cat': must be an object"),
        ([None], r"has include\[0\] None: must be an object"),
        ([], r"has include \[\]: must have a clause"),
        (None, "has include None: must have a clause"),
        ({"class": "cat", "count": 1}, "has include .*: must be a list"),
        ("cat", "has include 'cat': must be a list"),
        (1, "has include 1: must be a list"),
    ],
)
def test_every_damage_is_told(include, message):
    """Oracle: the part of the record that was damaged, by hand."""
    with pytest.raises(ValueError, match=message):
        check({"tag": "two_object", "include": include}, COCO.classes, COCO.colors)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "has no GenEval record"),
        ({"include": [CAT]}, "has no GenEval record"),
        ({"tag": "colors"}, "has no GenEval record"),
        ({"tag": ["colors"], "include": [CAT]}, "has tag .*: must be a text"),
        ({"tag": "x", "include": [CAT], "exclude": 3}, "has exclude 3: must be a list"),
        ({"tag": "x", "include": [CAT], "exclude": None}, "has exclude None: must be"),
        (
            {"tag": "x", "include": [CAT], "exclude": [CAT | {"count": 0}]},
            r"has exclude\[0\].count 0",
        ),
        (
            {"tag": "x", "include": [CAT], "exclude": [CAT | {"color": "red"}]},
            r"has exclude\[0\].color: is not followed",
        ),
    ],
)
def test_the_rest_of_a_record(record, message):
    """Oracle: as above."""
    with pytest.raises(ValueError, match=message):
        check(record)


def test_words_are_the_detectors():
    """Oracle: shapes and colours that the embedded world has, and one it has not."""
    known = SpriteDetector.classes, SpriteDetector.color_names
    clause = {"class": "circle", "count": 2, "color": "red"}
    check({"tag": "colors", "include": [clause]}, *known)
    for damage in ({"class": "cat"}, {"color": "pink"}):
        with pytest.raises(ValueError, match="the detector does not know it"):
            check({"tag": "colors", "include": [clause | damage]}, *known)
        check({"tag": "colors", "include": [clause | damage]})
