"""A few inputs of every surface of benchmarks/fuzz; the many are the benchmark's."""

from pathlib import Path

import pytest

from benchmarks.fuzz import core
from benchmarks.fuzz.__main__ import SURFACES, surface_of
from flowgrpo_jax.errors import UserError

FOLDER = Path(core.__file__).parent
PRESENT = [name for name in SURFACES if (FOLDER / f"{name}.py").is_file()]


@pytest.mark.parametrize("name", PRESENT)
def test_nothing_but_one_line(name):
    """Oracle: the surface's own."""
    tally = core.Tally()
    core.run(surface_of(name), 50, 1, tally)
    assert not tally.bad, tally.examples
    assert tally.counts[core.REFUSED]


def _check(given: str) -> str:
    with core.refused() as lines:
        if given == "line":
            raise UserError("key: value: must be another")
        if given == "empty":
            raise UserError("")
        if given == "error":
            raise ValueError("a traceback")
        if given == "exit":
            raise SystemExit(1)
        if given == "wrong":
            raise core.Wrong("accepted")
        while given == "hang":
            pass
    return core.REFUSED if lines else core.RIGHT


@pytest.mark.parametrize(
    "given, outcome",
    [
        ("fine", core.RIGHT),
        ("line", core.REFUSED),
        ("empty", core.WRONG),
        ("error", core.TRACEBACK),
        ("exit", core.TRACEBACK),
        ("wrong", core.WRONG),
        ("hang", core.HANG),
    ],
)
def test_every_outcome_is_told_apart(given, outcome):
    tally = core.Tally()
    core.try_one(_check, given, 0.2, tally)
    assert tally.counts == {outcome: 1}
    assert bool(tally.examples) == (outcome in core.BAD)
