"""The update on a one-parameter model: gradients, skipping, EMA, chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowgrpo_jax.rl import update as rl_update

RATE = 0.1
EVERY_UPDATE = rl_update.Ema(0.9, 1)


def quadratic(variables, text, element):
    """(w - x)^2 per slot and sibling, so that the gradient is 2 (w - x)."""
    del text
    loss = (variables["w"] - element) ** 2
    return loss, {"loss": loss, "ratio_gap": jnp.abs(element)}


def gradients(state, update_batch):
    return rl_update.local_gradients(
        quadratic,
        lambda batch: batch.reward,  # stands for what an entry points to
        update_batch,
        state.trainable,
        lambda prompt: (),
    )


def run(elements, weights, ema=EVERY_UPDATE, behaviour=None):
    """Updates of w from 0; both arrays are [update, batch, slot]."""
    optimizer = optax.sgd(RATE)
    state = rl_update.init_state({"w": jnp.zeros(())}, optimizer, behaviour is not None)
    zeros = jnp.zeros(weights.shape, jnp.int32)
    update_batch = rl_update.UpdateBatch(
        item=zeros,
        prompt=zeros,
        weight=weights[..., None],
        advantage=weights[..., None],
        reward=elements[..., None],
        number=zeros[..., None],
        draw=zeros,
    )
    return rl_update.update(optimizer, ema, behaviour, gradients, state, update_batch)


def test_one_step_is_the_weighted_mean_gradient():
    """Oracle: closed form of SGD on a quadratic, over two microbatches."""
    elements = jnp.arange(4.0).reshape(1, 2, 2)  # update, batch, slot
    weights = jnp.array([[[1.0, 0.0], [2.0, 1.0]]])
    state, info = run(elements, weights)
    mean = (weights * elements).sum() / weights.sum()
    np.testing.assert_allclose(state.trainable["w"], RATE * 2 * mean, rtol=1e-6)
    expected = (weights * elements**2).sum() / weights.sum()
    np.testing.assert_allclose(info["loss"][0], expected, rtol=1e-6)
    assert info["ratio_gap"][0] == 3.0


def test_later_chunks_see_the_earlier_steps():
    """Oracle: closed form, w_2 = w_1 + 2 rate (x - w_1)."""
    state, _ = run(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
    first = RATE * 2
    np.testing.assert_allclose(
        state.trainable["w"], first + RATE * 2 * (1 - first), rtol=1e-6
    )
    assert state.updates == 2


def test_batches_without_weight_are_not_computed():
    """Oracle: NaN in a skipped microbatch cannot reach anything."""
    elements = jnp.array([1.0, jnp.nan]).reshape(1, 2, 1)
    state, info = run(elements, jnp.array([1.0, 0.0]).reshape(1, 2, 1))
    np.testing.assert_allclose(state.trainable["w"], 2 * RATE, rtol=1e-6)
    assert np.isfinite(info["loss"]).all()


def test_a_chunk_without_weight_changes_nothing():
    """Oracle: an invariance; not even the counters move."""
    state, _ = run(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1)))
    assert state.trainable["w"] == 0 and state.updates == 0


def test_ema_follows_the_official_schedule():
    """Oracle: golden_numbers.md 7: k = 7, 15, 23 ... 87, nothing in between."""
    ema = rl_update.Ema(0.9, 8)
    kept = np.asarray(ema.keep(jnp.arange(8, 89)))
    np.testing.assert_allclose(
        kept[::8],
        [0.470588, 0.64, 0.727273, 0.780488, 0.816327, 0.842105]
        + [0.861538, 0.876712, 0.888889, 0.898876, 0.9],
        rtol=1e-5,
    )
    between = np.arange(8, 89) % 8 != 0
    assert (kept[between] == 1).all()


def test_a_young_ema_moves_at_every_update():
    """Oracle: the formula by hand, (1 + k) / (10 + k) for k = 0, 1, and closed form.

    A run of one update would else export, score and compare its base model.
    """
    ema = rl_update.Ema(0.9, 8)
    np.testing.assert_allclose(ema.keep(jnp.arange(1, 3)), [1 / 10, 2 / 11], rtol=1e-6)
    ones = jnp.ones((2, 1, 1))
    state, _ = run(ones[:1], ones[:1], ema)
    np.testing.assert_allclose(state.ema["w"], 0.9 * 2 * RATE, rtol=1e-6)
    state, _ = run(ones, ones, ema)
    first, second = 2 * RATE, 1 - (1 - 2 * RATE) ** 2
    expected = 2 / 11 * 0.9 * first + 9 / 11 * second
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


def test_behaviour_policies_follow_the_learner():
    """Oracle: golden_numbers.md 14 (ramps and copies), closed form."""
    updates = jnp.arange(1, 1001)
    first = rl_update.Behaviour(0.0, 0.001, 0, 0.5, 1).keep(updates)
    np.testing.assert_allclose(
        np.asarray(first)[[9, 499, 999]], [0.01, 0.5, 0.5], rtol=1e-5
    )
    late = rl_update.Behaviour(0.0, 0.0075, 75, 0.999, 1).keep(updates)
    np.testing.assert_allclose(
        np.asarray(late)[[73, 74, 174, 999]], [0, 0, 0.75, 0.999], rtol=1e-5
    )

    ones = jnp.ones((3, 1, 1))
    copy = rl_update.Behaviour(0.0, 0.0, 0, 0.0, 2)
    state, _ = run(ones, ones, behaviour=copy)
    np.testing.assert_allclose(state.behaviour["w"], 1 - (1 - 2 * RATE) ** 2, rtol=1e-6)
    frozen = rl_update.Behaviour(1.0, 0.0, 0, 1.0, 1)
    assert run(ones, ones, behaviour=frozen)[0].behaviour["w"] == 0


@pytest.mark.parametrize("name, first", [("adamw", 1.0), ("muon", 1 + 0.9 / 1.9)])
def test_optimizers_step(name, first):
    """Oracle: Adam's first step in closed form (Muon's Adam part is Nesterov's)."""
    params = {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones(3)}
    optimizer = rl_update.make_optimizer(
        rl_update.OptimizerSpec(name, 1e-2, 0.0, 1e-8, 1.0)
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all((u < 0).all() for u in jax.tree.leaves(updates))
    np.testing.assert_allclose(updates["bias"], -1e-2 * first, rtol=1e-3)


def test_a_largest_norm_of_zero_is_no_clip():
    """Oracle: a clip that nothing reaches; the state has the same form."""
    params = {"kernel": jnp.ones((2, 2))}
    gradients = {"kernel": jnp.full((2, 2), 50.0)}
    made = []
    for norm in (0.0, 1e9):
        optimizer = rl_update.make_optimizer(
            rl_update.OptimizerSpec("adamw", 1e-2, 0.0, 1e-8, norm)
        )
        state = optimizer.init(params)
        made.append(optimizer.update(gradients, state, params))
    jax.tree.map(np.testing.assert_array_equal, made[0], made[1])
    assert np.all(np.asarray(made[0][0]["kernel"]) != 0)
