"""Prompts of a run: what its rewards cannot score, and what is worth a line."""

import json
from types import SimpleNamespace

import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import prompt_checks
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.folder_encoders import FolderEncoders
from flowgrpo_jax.models.text import Reader
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


class Letters:
    """A tokenizer of transformers: a letter is a token; `state` makes it another one."""

    def __init__(self, state=""):
        self.backend_tokenizer, self.state, self.calls = self, state, 0

    def to_str(self):
        return json.dumps({"state": self.state, "padding": id(self)})

    def __call__(self, texts, **_):
        self.calls += 1
        return SimpleNamespace(input_ids=[list(text) for text in texts])


class Encoders(FolderEncoders):
    def readers(self):
        return [Reader("CLIP-L", 4, LETTERS), Reader("T5", 9, LETTERS)]


LETTERS = Letters()


def test_what_text_encoders_do_not_read_is_counted(monkeypatch):
    """Oracle: by hand; a line an encoder, one for those of the same tokens."""
    others = {
        "alike": Reader("CLIP", 4, Letters()),
        "other": Reader("CLIP", 4, Letters("other")),
        "short": Reader("CLIP", 3, LETTERS),
        "blind": None,
    }
    for name, reader in others.items():

        def make(context, reader=reader):
            reward = lambda images, prompts: {}  # noqa: E731
            reward.reader = reader
            return reward

        monkeypatch.setitem(registry.REWARDS, name, make)
    context, prompts = registry.Context(), ["ab", "abcdef", "abcde", "ab", "abcde", ""]
    encoders = Encoders("nowhere", 9, "float32")
    lines = prompt_checks.cut(encoders, others, context, prompts, "prompts")
    lost = "warning: prompts: 2 of 4 prompts lose tokens in CLIP"
    two = "(at most 2 of 6 tokens cut), such as 'abcdef'"
    assert lines == [
        f"{lost}-L and CLIP of the reward alike {two}",
        f"{lost} of the reward other {two}",
        f"{lost} of the reward short (at most 3 of 6 tokens cut), such as 'abcdef'",
    ]
    assert others["alike"].tokenizer.calls == 0
    assert prompt_checks.cut(None, ("blind",), context, prompts, "x") == []
