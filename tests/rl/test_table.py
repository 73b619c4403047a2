"""The table of objectives: a room each, and options that say what they may hold."""

import ast
import dataclasses
from pathlib import Path

import pytest

from flowgrpo_jax import rl
from flowgrpo_jax.config import values
from flowgrpo_jax.rl.objectives import options
from flowgrpo_jax.rl.objectives.table import OBJECTIVES

ROOMS = sorted(Path(rl.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_function_an_algorithm_in_a_room_of_its_name(name):
    """Oracle: the source; nothing else in rl/ bears the name of an algorithm."""
    homes = [
        room.stem
        for room in ROOMS
        for node in ast.walk(ast.parse(room.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert homes == [name]
    score = OBJECTIVES[name].score
    assert score.__name__ == name
    assert "arXiv" in score.__doc__


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_may_be_given(name):
    """Oracle: the rules by which a config is checked; a type without a rule is seen."""
    for field in dataclasses.fields(OBJECTIVES[name].options):
        known = options.choices(field) or options.between(field) or field.type is bool
        assert known, field
        if field.default is not dataclasses.MISSING:
            assert values._rule_of(field)(field.default) is None
