"""The way of one sample, for plans of every kind, on a flow of three numbers."""

import dataclasses

import numpy as np
import pytest

from flowgrpo_jax.engine import trajectory
from tests import toy

MODEL = dataclasses.replace(toy.MODEL, latent_shape=(1, 1, 3))
VARIABLES = {"transformer": {"mean": np.zeros(3, np.float32)}, "text": {}}
# Recipe -> its steps (trained, stochastic, deterministic), how many other images of the
# prompt they answer for, and what makes it small.
RECIPES = {
    "flow_grpo": ("ttts", 0, {"group_size": 3}),
    "mix_grpo_flash": (
        "tdd",
        0,
        {
            "group_size": 3,
            "sample__sde_window_size": 1,
            "sample__sde_window_range": (0, 2),
        },
    ),
    "g2rpo_released": ("tddd", 1, {"group_size": 3, "sample__branch_steps": (0, 1)}),
    "branch_grpo": ("tttd", 3, {"group_size": 4, "sample__branch_steps": (1, 2)}),
    "dense_grpo": ("ttts", 4, {"group_size": 3}),
    "diffusion_nft": ("dddd", 0, {"group_size": 3}),
}


def bright(images, prompts):
    del prompts
    return {"geneval": -np.square(images - 1.0).mean(axis=(1, 2, 3))}


def collected(monkeypatch, recipe):
    """Iteration 0 of a recipe, before its update."""
    monkeypatch.setattr(toy, "MODEL", MODEL)
    monkeypatch.setattr(toy, "VARIABLES", VARIABLES)
    run = toy.make_run(
        monkeypatch,
        recipe,
        bright,
        prompts_per_iteration=2,
        updates_per_iteration=1,
        microbatch=3,
        sample__num_steps=4,
        **RECIPES[recipe][2],
    )
    return run.collect(run.initial_state(), 0)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=pytest.mark.more) if name == "branch_grpo" else name
        for name in RECIPES
    ],
)
def test_every_step_of_a_way(recipe, monkeypatch):
    """Oracle: what the iteration kept, found by its bits, and a chain without gaps."""
    got = collected(monkeypatch, recipe)
    one = trajectory.of(got, 1, 2)
    kinds = "".join(
        "t" if s.trained else "s" if s.stochastic else "d" for s in one.steps
    )
    assert (kinds, len(one.others)) == RECIPES[recipe][:2]
    assert not one.unequal
    for before, after in zip(one.steps, one.steps[1:], strict=False):
        np.testing.assert_array_equal(before.next_latent, after.latent)
        assert (before.stop, before.sigma_next) == (after.start, after.sigma)
    np.testing.assert_array_equal(one.steps[-1].next_latent, one.clean)
    images = np.concatenate(got.images)[np.argsort(np.concatenate(got.numbers))]
    found = (images == one.leaf.image).all(axis=(1, 2, 3))
    assert found.any() and got.leaves.prompt[found].tolist() == [1] * found.sum()
    assert one.leaf.rewards["avg"] in got.measured["avg"][found]
    for step in one.steps:
        assert (step.log_prob is None) is not step.stochastic
        assert (step.advantage is None) is not step.trained
        if step.trained:
            kept = got.made.transitions
            state = (np.asarray(kept.latent) == step.latent).all(axis=(2, 3, 4))
            action = (np.asarray(kept.next_latent) == step.next_latent).all((3, 4, 5))
            log_probs = np.asarray(kept.log_prob)[state[..., None] & action]
            assert len(log_probs) and (log_probs == np.float32(step.log_prob)).all()
    by_image = got.work.learns_from_samples
    assert (one.advantage is not None) is by_image
    if by_image:  # one that the update batch has for this prompt and member
        batch = got.update_batch
        entry = (batch.prompt[..., None] == 1) & (batch.number == 2)
        entry &= batch.weight != 0
        assert set(batch.advantage[entry].tolist()) <= {np.float32(one.advantage)}


def test_what_is_not_the_same_bits_is_told(monkeypatch):
    """Oracle: by hand; what the iteration kept is changed behind its back."""
    got = collected(monkeypatch, "flow_grpo")
    kept = got.made.transitions
    moved = got.made.replace(transitions=kept.replace(log_prob=kept.log_prob + 0.5))
    told = trajectory.of(got._replace(made=moved), 0, 0).unequal
    assert told == [f"step {k}: the log-prob by 0.5" for k in range(3)]
