"""The embedded world's prompts: what is held out, and that every word is known."""

import functools
from collections import Counter

import pytest

from flowgrpo_jax.data import geneval_prompts
from flowgrpo_jax.models.text import UNKNOWN
from flowgrpo_jax.worlds.sprites import model
from flowgrpo_jax.worlds.sprites.prompts import PROMPTS

HELD_OUT = {
    "single_object": 5,
    "two_object": 4,
    "counting": 3,
    "colors": 7,
    "position": 40,
    "color_attr": 462,
}


@functools.cache
def split(name):
    return PROMPTS.generate(name)


def content(prompt) -> tuple:
    """What a picture must show, whatever the wording: written here, on its own.

    The clauses in the order of their names; a relation is read from the object that
    comes first, so that "A left of B" is "B right of A".
    """
    opposite = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
    }
    include = prompt.metadata["include"]
    relation = include[1]["position"][0] if "position" in include[-1] else None
    clauses = [(c["class"], c["count"], c.get("color")) for c in include]
    if relation and clauses[1][0] > clauses[0][0]:
        relation = opposite[relation]
    return prompt.metadata["tag"], tuple(sorted(clauses)), relation


def test_held_out_counts():
    """Oracle: by hand, fraction times contents times wordings; 521 in all."""
    counts = Counter(prompt.metadata["tag"] for prompt in split("test"))
    assert counts == HELD_OUT
    assert sum(counts.values()) == 521
    assert len({prompt.text for prompt in split("test")}) == 521


def test_training_never_shows_a_held_out_content():
    """Oracle: contents compared by the test's own rule, in any order or wording."""
    train = {content(prompt) for prompt in split("train")}
    held_out = {content(prompt) for prompt in split("test")}
    assert not train & held_out
    assert not any(
        prompt.metadata["tag"] == "single_object" for prompt in split("train")
    )


def test_train_list():
    """Closed form: 6800 prompts in Flow-GRPO's mixture 7:5:3:1:1, 400 to a part."""
    counts = Counter(prompt.metadata["tag"] for prompt in split("train"))
    proportions = geneval_prompts.TRAIN_PROPORTIONS
    assert counts == {tag: 400 * part for tag, part in proportions.items() if part}


def test_splits_do_not_change():
    """Oracle: an invariance; the description alone makes the prompts."""
    assert PROMPTS.generate("test") == split("test")
    assert PROMPTS.generate("train") == split("train")


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_word_is_known(name):
    """Oracle: the tokenizer; no unknown word, nothing cut, all prompts apart."""
    size = model.Size()
    texts = sorted({prompt.text for prompt in split(name)})
    tokenizer = model.make_model(size).tokenizer
    ids = tokenizer(texts)
    assert (ids != UNKNOWN).all()
    longer = type(tokenizer)(tokenizer.words, size.max_words + 1)(texts)
    assert (longer[:, -1] == 0).all()
    assert len({tuple(row) for row in ids}) == len(texts)
