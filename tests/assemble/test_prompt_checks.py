"""Prompts of a run: what its rewards cannot score, and what is worth a line."""

import json

import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import prompt_checks
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.text import Cut
from flowgrpo_jax.rewards import ocr, registry
from flowgrpo_jax.rewards.service import replay
from flowgrpo_jax.worlds.text import LetterTokenizer, WordTokenizer

CIRCLE = {"tag": "colors", "include": [{"class": "circle", "count": 1}]}


def _check(tmp_path, record, key="prompts", config=None):
    """Check a file of a good record and this one, as a run does."""
    path = tmp_path / "mine.jsonl"
    lines = [CIRCLE | {"prompt": "a circle"}, {"prompt": "two"} | record]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = config or configs.make()
    config.prompts = config.eval.prompts = str(path)
    prompts = assemble.load_prompt_set(str(path), "train", key)
    assemble.check_prompts(config, assemble.reward_context(config), prompts, key)


@pytest.mark.parametrize("key", ["prompts", "eval.prompts"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "has no GenEval record"),
        ({"tag": "x", "include": [{"class": "ring", "count": "1"}]}, "count '1'"),
        ({"tag": "x", "include": [{"class": "cat", "count": 1}]}, "does not know it"),
    ],
)
def test_a_reward_tells_what_it_cannot_score(tmp_path, key, record, message):
    """Oracle: key, file and line of the record that was damaged."""
    with pytest.raises(
        UserError, match=rf"^{key}: .*mine\.jsonl:2: reward geneval: "
    ) as e:
        _check(tmp_path, record, key)
    assert message in str(e.value) and "\n" not in str(e.value)
    _check(tmp_path, CIRCLE, key)


def test_rewards_and_monitors_of_evaluations(tmp_path, monkeypatch):
    """Oracle: only the key whose images a reward sees is refused."""

    def picky(context):
        reward = lambda images, prompts: {}  # noqa: E731
        reward.check_prompt = ocr.check_prompt
        return reward

    monkeypatch.setitem(registry.REWARDS, "picky", picky)
    for change in ({"eval__reward": {"picky": 1.0}}, {"monitors": ("picky",)}):
        config = configs.make(**change)
        _check(tmp_path, CIRCLE, "prompts", config)
        with pytest.raises(UserError, match=r"mine\.jsonl:1: reward picky: .* quotes"):
            _check(tmp_path, CIRCLE, "eval.prompts", config)


def test_a_kept_reward_checks_as_the_reward_does(tmp_path):
    """Oracle: the same line through `replay`."""
    config = configs.make()
    config.reward_options.geneval = {"replay": str(tmp_path / "kept.sqlite")}
    with pytest.raises(UserError, match=r"mine\.jsonl:2: reward geneval: .* record"):
        _check(tmp_path, {}, config=config)
    made = replay.Replay("x", lambda images, prompts: {}, tmp_path / "x.sqlite", {})
    assert made.check_prompt is None


def test_a_prompt_set_has_no_lines():
    """Oracle: the prompt itself is named."""
    config = configs.make(prompts="words")
    prompts = assemble.load_prompt_set("words", "train")
    with pytest.raises(UserError, match="^prompts: words: reward geneval: the prompt "):
        assemble.check_prompts(config, assemble.reward_context(config), prompts)


def test_shipped_prompts_have_nothing_to_be_told():
    """Oracle: they were made for these models; nothing held out is trained on."""
    for name in ("sprites", "words"):
        config = configs.make(model=name)
        model, _ = assemble.load_model(config)
        train, test = (assemble.load_prompt_set(name, s) for s in ("train", "test"))
        assert prompt_checks.notes(model.tokenizer, train, test) == []


def test_prompts_that_are_trained_on_and_held_out():
    """Oracle: counted by hand; other spaces or files do not make another prompt."""
    train = [Prompt("a", {}, 0), Prompt("b", {}, 1), Prompt("b", {}, 2)]
    [line] = prompt_checks.notes(None, train, [Prompt("b"), Prompt("c"), Prompt("b")])
    assert line.startswith("warning: eval.prompts: 2 of 3 are in prompts too")
    assert prompt_checks.notes(None, train, [Prompt("c")]) == []
    assert prompt_checks.notes(None, [], train) == []


def test_what_an_embedded_model_does_not_read_is_counted():
    """Oracle: by hand, of words and of letters, exactly at the limit and one beyond."""
    words = WordTokenizer(("red", "blue", "circle"), max_length=3)
    train = [
        Prompt("a photo of a red blue circle"),  # three words and four that say nothing
        Prompt("red red red circle"),
        Prompt("a red star"),
        Prompt("red red red circle"),
    ]
    cut, unknown = prompt_checks.notes(words, train, [])
    assert cut.startswith("warning: prompts: 1 of 3 are cut: the model reads 3 words")
    assert "'red red red circle'" in cut
    assert "prompts: 1 of 3 are with words that" in unknown and "star" in unknown
    letters = LetterTokenizer("ABC", max_length=3)
    held_out = [Prompt('"abc"'), Prompt('"abca"'), Prompt('"xyz"')]
    cut, unknown = prompt_checks.notes(letters, [], held_out)
    assert cut.startswith("warning: eval.prompts: 1 of 3 are cut") and "abca" in cut
    assert "1 of 3" in unknown and "xyz" in unknown


class Reads:
    """Stands for text encoders, or for a reward that reads: a letter is a token."""

    key = files = shapes = encoding = None  # of `PromptEncoders`, and not asked

    def __init__(self, **limits):
        self.limits = limits

    def cut(self, texts):
        found = [
            Cut(name, limit, {text: len(text) for text in texts if len(text) > limit})
            for name, limit in self.limits.items()
        ]
        return [one for one in found if one.tokens]


def test_what_text_encoders_do_not_read_is_counted(monkeypatch):
    """Oracle: by hand; a line an encoder, one for those that cut alike."""
    for name, limit in (("alike", 4), ("short", 2)):
        monkeypatch.setitem(
            registry.REWARDS, name, lambda context, limit=limit: Reads(CLIP=limit)
        )
    monkeypatch.setitem(registry.REWARDS, "blind", lambda context: len)
    context, prompts = registry.Context(), ["ab", "abcdef", "abcde", "ab", "abcde", ""]
    lines = prompt_checks.cut(
        Reads(CLIP=4, T5=9), ("alike", "short", "blind"), context, prompts, "prompts"
    )
    lost = "warning: prompts: 2 of 4 prompts lose tokens in CLIP"
    assert lines == [
        f"{lost} and CLIP of the reward alike (at most 2 of 6 tokens cut), such as "
        "'abcdef'",
        f"{lost} of the reward short (at most 4 of 6 tokens cut), such as 'abcdef'",
    ]
    for encoders in (None, Reads(T5=9)):
        assert prompt_checks.cut(encoders, ("blind",), context, prompts, "x") == []
