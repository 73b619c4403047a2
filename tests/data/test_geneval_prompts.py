"""The benchmark's test set, training sets and held-out splits."""

from collections import Counter

import pytest

from flowgrpo_jax.data.geneval_grammar import (
    COCO,
    TASKS,
    Item,
    Request,
    Vocabulary,
    content,
)
from flowgrpo_jax.data.geneval_prompts import (
    TEST_NUM,
    TEST_SEED,
    enumerate_split,
    generate,
    train_list,
)
from flowgrpo_jax.errors import UserError

SPRITES = Vocabulary(
    ("circle", "square", "triangle", "cross", "ring"),
    ("red", "green", "blue", "yellow", "purple", "cyan", "black"),
    colorless=(),
)
FRACTIONS = {
    "single_object": 1.0,
    "two_object": 0.2,
    "counting": 0.2,
    "colors": 0.2,
    "position": 0.5,
    "color_attr": 0.5,
}


def _tags(prompts):
    return Counter(prompt.metadata["tag"] for prompt in prompts)


def _content(prompt):
    """The content of a prompt, read back from its record."""
    items = [
        Item(clause["class"], clause["count"], clause.get("color"))
        for clause in prompt.metadata["include"]
    ]
    relation = None
    if prompt.metadata["tag"] == "position":
        items.reverse()
        relation = prompt.metadata["include"][1]["position"][0]
    return content(Request(prompt.metadata["tag"], tuple(items), relation))


def test_coco_test_set_is_the_benchmark():
    """Oracle: the published set: its sizes by task, and prompts out of it."""
    prompts = generate(COCO, "test", TEST_NUM, TEST_SEED)
    assert len(prompts) == len({p.text for p in prompts}) == 553
    assert _tags(prompts) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert [p.text for p in prompts[79:82]][1:] == [
        "a photo of a bench and a sports ball",
        "a photo of a toothbrush and a snowboard",
    ]
    published = {
        "a photo of a person and a traffic light",
        "a photo of four benchs",
        "a photo of two toothbrushs",
        "a photo of three buses",
        "a photo of a brown orange",
        "a photo of a black tv remote",
        "a photo of a skis right of a zebra",
        "a photo of a pizza right of a banana",
        "a photo of an elephant below a horse",
        "a photo of a kite above a toothbrush",
        "a photo of a brown car and a pink hair drier",
        "a photo of a green surfboard and an orange oven",
    }
    assert published <= {p.text for p in prompts}


def test_coco_training_set():
    """Oracle: no content of the test set; the mixture 7:5:3:1:1 of 3400."""
    train = generate(COCO, "train", 3400, 0)
    assert _tags(train) == {
        "position": 1400,
        "counting": 1000,
        "color_attr": 600,
        "colors": 200,
        "two_object": 200,
    }
    tested = {_content(p) for p in generate(COCO, "test", TEST_NUM, TEST_SEED)}
    assert not tested & {_content(p) for p in train}
    # 240 countings but the test's 80 are left, 1000 places: 6 or 7 times each.
    counted = Counter(p.text for p in train if p.metadata["tag"] == "counting")
    assert len(counted) == 160 and set(counted.values()) == {6, 7}
    assert [p.index for p in train] == list(range(3400))


def test_split_of_the_sprite_world():
    """Oracle: exact fractions of the contents, counted by hand."""
    train, held_out = enumerate_split(SPRITES, FRACTIONS)
    assert _tags(held_out) == {
        "single_object": 5,
        "two_object": 2 * 2,  # .2 of 10 contents, two wordings each
        "counting": 3,
        "colors": 7,
        "position": 20 * 2,
        "color_attr": 210 * 2,
    }
    assert len(train) + len(held_out) == 5 + 20 + 15 + 35 + 80 + 840
    assert not {_content(p) for p in train} & {_content(p) for p in held_out}
    every = train + held_out
    assert sorted(p.index for p in every) == list(range(995))
    assert len({p.text for p in every}) == 995


def test_held_out_set_of_useful_size():
    """Oracle: 479 prompts at these fractions; .55 of the attributions gives 521."""
    assert len(enumerate_split(SPRITES, FRACTIONS)[1]) == 479
    more = {**FRACTIONS, "color_attr": 0.55}
    assert len(enumerate_split(SPRITES, more)[1]) == 521


def test_split_is_stable():
    """Oracle: invariance to the order of the words; a held-out task written down."""
    shuffled = Vocabulary(SPRITES.classes[::-1], SPRITES.colors[::-1], ())
    held_out, again = (
        {p.text for p in enumerate_split(vocabulary, FRACTIONS)[1]}
        for vocabulary in (SPRITES, shuffled)
    )
    assert held_out == again
    words = ("two", "three", "four")
    assert {text for text in held_out if text.split()[3] in words} == {
        "a photo of two circles",
        "a photo of four circles",
        "a photo of four crosses",
    }


def test_small_tasks_hold_out_two_and_train_on_one():
    """Oracle: 3 pairs at .1 and at .9 both split 2 + 1 by content."""
    tiny = Vocabulary(("a", "b", "c"), ("red", "blue"), ())
    for fraction in (0.1, 0.9):
        sides = enumerate_split(tiny, {**FRACTIONS, "two_object": fraction})
        assert [_tags(side)["two_object"] for side in sides] == [2, 4]
    sides = enumerate_split(tiny, {**FRACTIONS, "two_object": 0})
    assert [_tags(side)["two_object"] for side in sides] == [6, 0]


@pytest.mark.parametrize("fractions", [{"colors": 1.5}, {"colors": -0.1}, {}])
def test_bad_fractions(fractions):
    """Oracle: the message names the key and the value."""
    others = {tag: 0.5 for tag in TASKS if tag != "colors"}
    value = fractions.get("colors")
    with pytest.raises(UserError, match=f"^test_fraction.colors: {value}: must"):
        enumerate_split(SPRITES, {**others, **fractions})


def test_train_list_is_proportional_and_even():
    """Oracle: 7:5:3:1:1 of 1700, and numbers of appearances within one."""
    train, _ = enumerate_split(SPRITES, FRACTIONS)
    drawn = train_list(train, 1700, 3)
    assert _tags(drawn) == {
        "position": 700,
        "counting": 500,
        "color_attr": 300,
        "colors": 100,
        "two_object": 100,
    }
    appearances = Counter(p.text for p in drawn)
    for tag in TASKS:
        numbers = [appearances[p.text] for p in train if p.metadata["tag"] == tag]
        assert not numbers or max(numbers) - min(numbers) <= 1
    assert drawn == train_list(train, 1700, 3)
    assert drawn != train_list(train, 1700, 4)
    # Shuffled: the first tenth holds every task.
    assert len(_tags(drawn[:170])) == 5


def test_published_mixture():
    """Oracle: the tasks' numbers in the 50,000 prompts of Flow-GRPO."""
    train, _ = enumerate_split(SPRITES, FRACTIONS)
    assert _tags(train_list(train, 50_000, 0)) == {
        "position": 20588,
        "counting": 14706,
        "color_attr": 8824,
        "colors": 2941,
        "two_object": 2941,
    }


def test_shares_go_by_largest_remainder():
    """Oracle: 10 over 7:5:3:1:1 is 4.12 2.94 1.76 .59 .59: 4 3 2 and one of two."""
    train, held_out = enumerate_split(SPRITES, FRACTIONS)
    tags = _tags(train_list(train, 10, 0))
    assert (tags["position"], tags["counting"], tags["color_attr"]) == (4, 3, 2)
    assert tags["colors"] + tags["two_object"] == 1
    with pytest.raises(UserError, match="^num_prompts: 0: "):
        train_list(train, 0, 0)
    singles = [p for p in held_out if p.metadata["tag"] == "single_object"]
    with pytest.raises(UserError, match="single_object"):
        train_list(singles, 5, 0)
