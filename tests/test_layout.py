"""The house: what stands at the top, and that every folder says what it is."""

import ast
import re
from pathlib import Path

import flowgrpo_jax

PACKAGE = Path(flowgrpo_jax.__file__).parent
COMMANDS = {"main", "sample", "evaluate", "compare", "export", "estimate"}


def test_the_top_level():
    """Oracle: the list, by hand; anything else belongs into a folder."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == COMMANDS | {"__init__", "train", "cli", "errors"}


def test_every_folder_says_what_lives_there_and_what_does_not():
    """Oracle: the first line of its docstring."""
    for path in PACKAGE.rglob("*"):
        if not path.is_dir() or not list(path.glob("*.py")):
            continue
        told = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
        first = told.splitlines()[0]
        assert re.search(r"\b(no|not|nothing)\b", first, re.IGNORECASE), path
