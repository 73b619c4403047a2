"""GenEval's wording and records."""

import json

import pytest

from flowgrpo_jax.data.geneval_grammar import (
    COCO,
    COCO80,
    TASKS,
    Item,
    Request,
    Vocabulary,
    content,
    enumerate_requests,
    record,
)
from flowgrpo_jax.errors import UserError

SPRITES = Vocabulary(
    ("circle", "square", "triangle", "cross", "ring"),
    ("red", "green", "blue", "yellow", "purple", "cyan", "black"),
    colorless=(),
)

# Lines of the metadata that Flow-GRPO ships for the benchmark.
RECORDS = [
    (
        Request("single_object", (Item("airplane"),)),
        (
            '{"tag": "single_object", "include": [{"class": "airplane", "count": 1}], '
            '"prompt": "a photo of an airplane"}'
        ),
    ),
    (
        Request("two_object", (Item("frisbee"), Item("apple"))),
        (
            '{"tag": "two_object", "include": [{"class": "frisbee", "count": 1}, '
            '{"class": "apple", "count": 1}], "prompt": "a photo of a frisbee and an apple"}'
        ),
    ),
    (
        Request("counting", (Item("wine glass", 2),)),
        (
            '{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], '
            '"exclude": [{"class": "wine glass", "count": 3}], '
            '"prompt": "a photo of two wine glasses"}'
        ),
    ),
    (
        Request("colors", (Item("tv", 1, "orange"),)),
        (
            '{"tag": "colors", "include": [{"class": "tv", "count": 1, "color": "orange"}],'
            ' "prompt": "a photo of an orange tv"}'
        ),
    ),
    (
        Request("position", (Item("cow"), Item("laptop")), "right of"),
        (
            '{"tag": "position", "include": [{"class": "laptop", "count": 1}, '
            '{"class": "cow", "count": 1, "position": ["right of", 0]}], '
            '"prompt": "a photo of a cow right of a laptop"}'
        ),
    ),
    (
        Request(
            "color_attr", (Item("snowboard", 1, "orange"), Item("cat", 1, "green"))
        ),
        (
            '{"tag": "color_attr", "include": [{"class": "snowboard", "count": 1, "color": '
            '"orange"}, {"class": "cat", "count": 1, "color": "green"}], '
            '"prompt": "a photo of an orange snowboard and a green cat"}'
        ),
    ),
]


@pytest.mark.parametrize(("request_", "line"), RECORDS)
def test_records_are_the_benchmarks(request_, line):
    """Oracle: published metadata lines, compared as text (so key order too)."""
    assert json.dumps(record(request_)) == line


@pytest.mark.parametrize(
    ("name", "text"),
    [("skis", "skises"), ("bus", "buses"), ("bench", "benchs"), ("cow", "cows")],
)
def test_plurals_are_as_naive_as_the_benchmarks(name, text):
    """Oracle: published prompts."""
    assert record(Request("counting", (Item(name, 3),)))["prompt"] == (
        f"a photo of three {text}"
    )


def test_coco_classes():
    """Oracle: COCO's count and order, the benchmark's renames."""
    assert len(set(COCO80)) == 80
    assert (COCO80[0], COCO80[10], COCO80[79]) == (
        "person",
        "fire hydrant",
        "toothbrush",
    )
    assert COCO80[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert all(name == name.strip() and "  " not in name for name in COCO80)


def test_number_of_requests():
    """Oracle: combinatorics, for the sprite world and for COCO without person."""

    def numbers(vocabulary):
        return [sum(1 for _ in enumerate_requests(vocabulary, tag)) for tag in TASKS]

    every = [r for tag in TASKS for r in enumerate_requests(SPRITES, tag)]
    assert len(set(every)) == len(every) == 995
    assert numbers(SPRITES) == [5, 20, 15, 35, 20 * 4, 20 * 42]
    assert numbers(COCO) == [80, 6320, 240, 790, 25280, 79 * 78 * 90]


def test_content_joins_the_wordings_of_one_picture():
    """Oracle: half as many contents as prompts in the ordered tasks; examples."""
    for tag, halves in zip(TASKS, (1, 2, 1, 1, 2, 2), strict=True):
        requests = list(enumerate_requests(SPRITES, tag))
        assert len({content(r) for r in requests}) * halves == len(requests)
    left = Request("position", (Item("ring"), Item("cross")), "left of")
    right = Request("position", (Item("cross"), Item("ring")), "right of")
    assert content(left) == content(right)
    assert content(left) != content(left._replace(relation="right of"))
    above = Request("position", (Item("ring"), Item("cross")), "above")
    below = Request("position", (Item("cross"), Item("ring")), "below")
    assert content(above) == content(below) != content(left)


def test_vocabulary_is_checked():
    """Oracle: the message names the key."""
    with pytest.raises(UserError, match="^vocabulary.colors: "):
        Vocabulary(("a", "b"), ("red",))
    with pytest.raises(UserError, match="^vocabulary.classes: "):
        Vocabulary(("person", "cat"), ("red", "blue"))
    with pytest.raises(ValueError, match="must be one of"):
        list(enumerate_requests(SPRITES, "colours"))
