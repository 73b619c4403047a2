"""Rules: what a value must be instead, in words."""

import math

import pytest

from flowgrpo_jax.config import rules
from flowgrpo_jax.errors import shown

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "rule, good, bad",
    [
        (rules.whole(1, 5), [1, 5], [0, 6, 1.0, True, "1", None, NAN, (1,), 10**400]),
        (rules.number(0, 1), [0, 1, 0.5], [-1e-9, 1.1, NAN, INF, True, "0", None]),
        (rules.number(0, above=True), [1e-30, 3], [0, 0.0, -1, INF, 10**400]),
        (rules.number(0, 1, below=True), [0, 0.999], [1, 1.0, NAN]),
        (rules.number(-rules.LARGEST), [-5, 0], [-INF, NAN, 1e39, -(10**400)]),
        (rules.flag, [True, False], [1, 0, "true", None]),
        (rules.one_of(("a", "b")), ["a"], ["c", 1, None, ("a",), {}]),
        (rules.text(), ["", "ü", "x\ny"], ["\ud800", "a\0b", 3, None]),
        (rules.text("a folder", empty=False), ["x"], [""]),
        (rules.regex, ["", "a|b"], ["(", "a{2,1}", 3, None, "[", "(?P<x"]),
        (rules.row(rules.whole(0), "steps"), [(), [1], (1, 2)], [1, "1", ("a",), None]),
        (rules.row(rules.whole(0), "s", least=1, most=2), [(1,)], [(), (1, 2, 3)]),
        (rules.row(rules.whole(0), "s", rising=True), [(0, 4)], [(1, 1), (2, 1)]),
        (rules.row(rules.whole(0), "s", distinct=True), [(4, 0)], [(1, 2, 1)]),
        (
            rules.table(rules.text("a name", empty=False), rules.number(0)),
            [{}, {"a": 1}],
            [{"a": "1"}, {"": 1}, {1: 1}, {"a": None}, {"a": {}}, 3, None, [1]],
        ),
        (rules.anything, [1, None, {"a": [1, {"b": "c"}]}], [{1: 2}, object(), [{3}]]),
    ],
)
def test_a_rule_takes_the_good_and_names_what_must_be(rule, good, bad):
    """Oracle: the lists, by hand."""
    for value in good:
        assert rule(value) is None, value
    for value in bad:
        fault = rule(value)
        assert fault is not None, value
        assert fault.wanted and "\n" not in fault.wanted


def test_a_fault_tells_where():
    """Oracle: the place, by hand."""
    weights = rules.table(rules.text(), rules.row(rules.number(0), "numbers"))
    assert weights({"a.b": (1, 2, "3")}) == (".a.b[2]", "3", "a number")


class _Rude:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value, text",
    [
        ("x" * 300, "x" * 200 + "..."),
        ("", "''"),
        pytest.param(10**5000, "a int (ValueError)", id="5,000 digits"),
        (_Rude(), "_Rude a _Rude (RuntimeError)"),
        ("\ud800", "\\ud800"),
        ({3}, "set {3}"),
        (0.5, "0.5"),
    ],
)
def test_every_value_can_be_shown(value, text):
    """Oracle: the text, by hand; the line must be one that can be printed."""
    assert shown(value) == text
    shown(value).encode()
