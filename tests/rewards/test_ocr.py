"""Scoring of text that was read; no engine."""

import itertools
import sys

import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import ocr, registry
from flowgrpo_jax.rewards.text_lines import BLANK, Line

SYMBOLS = (BLANK, "A", "a", "b", " ")


def _line(text, confidence=1.0, probabilities=None):
    """A line; by default the recogniser is certain of a's and b's in `text`."""
    if probabilities is None:
        frames = [SYMBOLS.index(c) for c in text if c in SYMBOLS]
        probabilities = np.eye(len(SYMBOLS))[frames]
    return Line(text, confidence, probabilities, SYMBOLS)


@pytest.mark.parametrize(
    ("read", "reward"),
    [
        ("HELLO WORLD", 1.0),
        ("xx Hello World zz", 1.0),
        ("Helo Wrld", 0.8),
        ("", 0.0),
        ("completely different long text", 0.0),
    ],
)
def test_values_of_the_reference(read, reward):
    """Oracle: values printed by Flow-GRPO's own code for the target Hello World."""
    assert ocr.similarity("Hello World", read) == reward
    scored = ocr.OCR(lambda images: [[_line(read)]])
    prompt = Prompt('a neon sign that reads "Hello World" and "not this"')
    result = scored(np.zeros((1, 8, 8, 3), np.float32), [prompt])
    assert result["ocr"] == [reward] and result["ocr_exact"] == [reward == 1]


def test_edit_distance():
    """Oracle: the textbook's examples, symmetry, and lengths against nothing."""
    for a, b, distance in [("kitten", "sitting", 3), ("saturday", "sunday", 3)]:
        assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == distance
    assert ocr.edit_distance("", "abc") == ocr.edit_distance("abc", "") == 3


def test_ctc_sums_over_all_alignments():
    """Oracle: the probability of every path of 5 frames, collapsed and added up."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=5)
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=5):
        runs = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
        probability = np.prod(probabilities[range(5), path])
        total[runs] = total.get(runs, 0.0) + probability
    for labels in [(1,), (1, 2), (2, 2), (1, 2, 1), (1, 1, 2)]:
        got = ocr.ctc_log_probability(np.log(probabilities), np.array(labels))
        np.testing.assert_allclose(got, np.log(total[labels]), rtol=1e-12)
    impossible = ocr.ctc_log_probability(np.log(probabilities), np.ones(4, int))
    assert impossible == -np.inf


def test_readability_is_linear_in_the_log_probability():
    """Oracle: closed forms: certain, a half for every letter, and none at all."""
    assert ocr.readability("Ab", [_line("ab")]) == 1
    assert ocr.readability("ab", []) == ocr.readability("ba", [_line("ab")]) == 0
    halves = np.array([[0.5, 0.25, 0.25, 0, 0], [0, 0, 0, 0.5, 0.5]])
    # "a" by its two cases .5, then "b" .5: log .25 over two letters.
    score = ocr.readability("ab", [_line("", probabilities=halves)])
    np.testing.assert_allclose(score, 1 + np.log(0.5) / 10)


def test_the_text_may_stand_in_one_line_or_in_all():
    """Oracle: certain where a line, or all together, say just that."""
    lines = [_line("aba"), _line("ba")]
    for wanted in ("aba", "ba", "ABA ba"):
        assert ocr.readability(wanted, lines) == 1
    assert ocr.readability("bab", lines) == 0


def test_doubtful_lines_may_be_left_out():
    """Oracle: by hand: the sure line alone is one letter short of the target."""
    lines = [_line("ab", 0.9), _line("a", 0.2)]
    images, prompts = np.zeros((1, 8, 8, 3), np.float32), [Prompt('"aba"')]
    assert ocr.OCR(lambda images: [lines])(images, prompts)["ocr"] == [1]
    sure = ocr.OCR(lambda images: [lines], "ctc", min_confidence=0.5)(images, prompts)
    assert sure["ocr"] == [0] and sure["ocr_exact"] == [0]
    np.testing.assert_allclose(sure["ocr_edit"], 2 / 3)


@pytest.mark.parametrize("text", ["no quotes", 'one " only', 'nothing in " " them'])
def test_a_prompt_must_quote_a_text(text):
    """Oracle: the line names the reward, the prompt and what to do."""
    with pytest.raises(UserError, match="^reward: ocr: prompt .* in double quotes"):
        ocr.OCR(lambda images: [[]])(np.zeros((1, 8, 8, 3), np.float32), [Prompt(text)])


def test_wrong_options_are_one_line():
    """Oracle: how the lines begin, by hand."""
    for options, line in [
        ({"score": "exact"}, "reward: ocr: score exact: must be one of edit, ctc"),
        ({"min_confidence": 2.0}, "reward: ocr: min_confidence 2.0: must be in"),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            ocr.OCR(lambda images: [[]], **options)


def test_a_missing_package_is_one_line(monkeypatch):
    """Oracle: the line, by hand, for an installation without the extra."""
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^reward: ocr: .*rapidocr.*flowgrpo_jax\[ocr"):
        registry.make("ocr")
