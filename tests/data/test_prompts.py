"""Digests and stateless batches."""

from collections import Counter

import pytest

from flowgrpo_jax.data.prompt_files import load_prompts
from flowgrpo_jax.data.prompts import Prompt, batch, digest
from flowgrpo_jax.errors import UserError


def _numbered(num):
    return [Prompt(f"prompt {i}", {}, i) for i in range(num)]


def test_a_digest_is_of_what_the_prompts_say(tmp_path):
    """Oracle: the edits themselves; a line that JSON writes otherwise says the same."""
    path = tmp_path / "train.jsonl"
    lines = ['{"prompt": "two cows", "tag": "counting", "n": 2}', '{"prompt": "x"}']

    def of(*lines):
        path.write_text("\n".join(lines))
        return digest(load_prompts(path))

    same = ['{"tag":"counting", "n": 2, "prompt":"two c\\u006fws"}', lines[1], ""]
    assert of(*lines) == of(*same)
    edits = [
        lines[::-1],
        lines[:1],
        [*lines, lines[1]],
        [lines[0].replace("cows", "cow"), lines[1]],
        [lines[0].replace("2", "3"), lines[1]],
        [lines[0].replace("2", '"2"'), lines[1]],
        [lines[0], '{"prompt": "x", "tag": ""}'],
    ]
    assert len({of(*lines), *(of(*edit) for edit in edits)}) == 1 + len(edits)


def test_an_epoch_shows_every_prompt_once():
    """Oracle: the multiset of the list; two epochs differ in order."""
    prompts = _numbered(12)
    epochs = [
        [p.index for i in range(3) for p in batch(prompts, 5, 3 * epoch + i, 4)]
        for epoch in range(2)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batch_is_a_function_of_seed_and_iteration():
    """Oracle: invariance to what was asked before; another seed differs."""
    prompts = _numbered(50)
    direct = batch(prompts, 3, 17, 8)
    for iteration in range(20):
        batch(prompts, 3, iteration, 8)
    assert batch(list(prompts), 3, 17, 8) == direct
    assert batch(prompts, 4, 17, 8) != direct


def test_first_place_is_uniform():
    """Oracle: 4 prompts, 2000 epochs: each leads 500 times, 5 sigma = 97."""
    prompts = _numbered(4)
    leads = Counter(batch(prompts, 0, epoch, 4)[0].index for epoch in range(2000))
    assert all(abs(leads[i] - 500) < 97 for i in range(4))


def test_texts_within_an_iteration_are_distinct():
    """Oracle: a set, for a list in which one text fills half of the places."""
    prompts = [Prompt("common", {}, i) for i in range(10)] + _numbered(10)
    for iteration in range(30):
        texts = [p.text for p in batch(prompts, 1, iteration, 6)]
        assert len(set(texts)) == 6


def test_copies_are_spread_through_the_epoch():
    """Oracle: 10 copies in 100 places: every run of 20 places has one to show."""
    prompts = [Prompt("common", {}, i) for i in range(10)] + _numbered(90)
    for iteration in range(50):
        texts = [p.text for p in batch(prompts, 2, iteration, 20)]
        assert texts.count("common") == 1


def test_too_few_texts_repeat_evenly():
    """Oracle: 3 texts in 8 places appear 2 or 3 times each."""
    counts = Counter(p.text for p in batch(_numbered(3), 0, 0, 8))
    assert sorted(counts.values()) == [2, 3, 3]
    pair = [Prompt("same", {}, 0), Prompt("same", {}, 1)]
    assert sorted(p.index for p in batch(pair, 0, 0, 2)) == [0, 1]


def test_bad_requests():
    """Oracle: the message names the key and the value."""
    with pytest.raises(UserError, match="^prompts_per_iteration: 0: "):
        batch(_numbered(2), 0, 0, 0)
    with pytest.raises(UserError, match="^prompts: "):
        batch([], 0, 0, 1)
