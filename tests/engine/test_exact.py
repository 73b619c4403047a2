"""`mesh.exact`: iterations of the toy on meshes of other sizes, bit for bit."""

import jax
import numpy as np
import pytest

from flowgrpo_jax.engine import credit
from tests import toy


def learned(monkeypatch, recipe, devices, exact=True):
    """(state, metrics) of two iterations."""
    run = toy.make_run(
        monkeypatch,
        recipe,
        mesh__data=devices,
        mesh__exact=exact,
        num_iterations=2,
        prompts_per_iteration=8,
        updates_per_iteration=2,
        group_size=2,  # packs of two would fill a microbatch
        microbatch=4,
        sample__num_steps=4,
    )
    state = run.initial_state()
    for iteration in range(2):
        state, metrics = run.step(state, iteration)
    told = {k: v for k, v in metrics.items() if not k.startswith("time/")}
    return jax.device_get((state, told))


@pytest.mark.parametrize("recipe", ["flow_grpo", "diffusion_nft"])
def test_two_devices_and_four_learn_the_same(recipe, monkeypatch):
    """Oracle: an invariance; transitions and samples, two updates each."""
    two, four = (learned(monkeypatch, recipe, devices) for devices in (2, 4))
    jax.tree.map(np.testing.assert_array_equal, two, four)


def test_exact_sums_are_those_of_fp32(monkeypatch):
    """Oracle: the same run without; to fp32 rounding."""
    exact, rounded = (
        learned(monkeypatch, "flow_grpo", 2, exact)[0].trainable
        for exact in (True, False)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), exact, rounded
    )


def test_scenes_stay_in_their_pack():
    """Oracle: by hand; six scenes in microbatches of two, on two devices."""
    for exact, items in ((True, [0, 1] * 4), (False, [0, 1, 2, 3] * 2)):
        rows, batch = credit.batch_of_scenes(np.arange(6), 2, 2, exact)
        assert rows.shape == (4, 2)
        assert batch.item.reshape(-1).tolist() == items
