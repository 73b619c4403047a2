"""The house of launchers: a back end is short, and says so where it cannot run."""

from pathlib import Path

import pytest

from launch.__main__ import BACK_ENDS

FOLDER = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_back_end_is_at_most_150_lines(name):
    """Oracle: a count; what back ends share is in files of its own."""
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 150


def test_every_file_is_named_in_the_docstring():
    """Oracle: the files."""
    told = (FOLDER / "__init__.py").read_text()
    for file in FOLDER.glob("*.py"):
        assert file.name.startswith("__") or file.name in told, file
