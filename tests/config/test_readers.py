"""Where the config is read."""

import ast
from pathlib import Path

import pytest

import flowgrpo_jax
from flowgrpo_jax import config as configs

PACKAGE = Path(flowgrpo_jax.__file__).parent
# The floors below assemble/: they take specs, which assemble/specs.py makes.
BELOW = (
    *("inference", "cost", "engine", "worlds", "rewards", "rl", "report"),
    *("data", "flow", "runtime"),  # models/ have configs of networks, of their own keys
)


def config_reads(source: str) -> list[int]:
    """Lines that ask `config`, or `x.config`, for a key of a run's config."""
    keys = set(configs.base())
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in keys
        and isinstance(node.value, ast.Name | ast.Attribute)
        and getattr(node.value, "id", getattr(node.value, "attr", "")) == "config"
    ]


@pytest.mark.parametrize("folder", BELOW)
def test_nobody_below_assemble_asks_the_config(folder):
    """Oracle: the sources; the linter sees imports, not what is handed down."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line in config_reads(path.read_text())
    ]
    assert not found


def test_what_reads_the_config_is_seen():
    """Oracle: three lines, by hand; a network's config has other keys."""
    source = "config.seed\nself.config.train.beta\nconfig.num_layers\nconfig.items()"
    assert config_reads(source) == [1, 2]
