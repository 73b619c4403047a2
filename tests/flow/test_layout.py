"""Layouts: every sample once, whole groups per chunk, padding masked."""

import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import layout as layouts


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("microbatch", [1, 4, 5])
@pytest.mark.parametrize("siblings", [1, 3])
def test_every_sample_stands_once(devices, microbatch, siblings):
    """Oracle: counting; chunk u holds the groups of its own prompts, in order."""
    layout = layouts.group_layout(6, 3, 2, microbatch, devices, siblings)
    assert layout.prompt.shape[1] % devices == 0
    assert layout.prompt.shape[2] == microbatch
    real = layout.mask > 0
    prompts = np.repeat(layout.prompt[real], siblings)
    pairs = list(zip(prompts, layout.member[real].flat, strict=True))
    assert pairs == [(p, m) for p in range(6) for m in range(3)]
    assert set(layout.prompt[0][real[0]]) == {0, 1, 2}


@pytest.mark.parametrize("siblings", [1, 3])
def test_collect_undoes_distribute(siblings):
    """Oracle: an invariance."""
    layout = layouts.group_layout(4, 3, 2, 4, 2, siblings)
    values = np.random.default_rng(0).normal(size=(12, 2))
    spread = layouts.distribute(values, layout)
    np.testing.assert_array_equal(layouts.collect(spread, layout), values)
    assert not spread[layout.mask == 0].any()


def test_chunks_must_hold_whole_groups():
    """Oracle: the config rule that updates divide the prompts."""
    with pytest.raises(UserError, match="updates_per_iteration: 4"):
        layouts.group_layout(6, 3, 4, 4, 1)
