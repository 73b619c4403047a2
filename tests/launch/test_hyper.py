"""The words of a sweep."""

import pytest

from flowgrpo_jax.errors import UserError
from launch import hyper


def test_words_of_a_sweep():
    """Oracle: by hand; the last factor varies fastest, one point goes with each."""
    seeds = hyper.sweep("config.seed", [1, 2])
    rates = hyper.sweep("config.train.learning_rate", (1e-4, 1e-3))
    assert hyper.product([seeds, rates]) == [
        {"config.seed": 1, "config.train.learning_rate": 1e-4},
        {"config.seed": 1, "config.train.learning_rate": 1e-3},
        {"config.seed": 2, "config.train.learning_rate": 1e-4},
        {"config.seed": 2, "config.train.learning_rate": 1e-3},
    ]
    zipped = hyper.zipit([seeds, rates, hyper.fixed("config.train.beta", 0.0)])
    assert [list(point.values()) for point in zipped] == [
        [1, 1e-4, 0.0],
        [2, 1e-3, 0.0],
    ]
    assert hyper.chainit([seeds, rates]) == [*seeds, *rates]
    nested = hyper.product([hyper.zipit([seeds, rates]), hyper.sweep("model", "ab")])
    assert [point["model"] for point in nested] == ["a", "b", "a", "b"]


def test_what_cannot_be_joined_is_told():
    """Oracle: the lines, by hand."""
    seeds = hyper.sweep("config.seed", [1, 2])
    with pytest.raises(UserError, match="zipit of 2, 3 points: all must have as many"):
        hyper.zipit([seeds, hyper.sweep("model", "abc")])
    with pytest.raises(UserError, match="config.seed: 3: is 1 in the same unit"):
        hyper.product([seeds, hyper.fixed("config.seed", 3)])
