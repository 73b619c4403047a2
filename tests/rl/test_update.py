"""The update on a one-parameter model: gradients, skipping, EMA, chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowgrpo_jax.rl import update as rl_update

RATE = 0.1
EVERY_UPDATE = rl_update.Ema(0.9, 1)


def quadratic(variables, reference, text, element):
    """(w - x)^2 per slot, so that the gradient is 2 (w - x)."""
    del reference, text
    loss = (variables["w"] - element) ** 2
    return loss, {"loss": loss, "far_gap": jnp.abs(element)}


def gradients(trainable, chunk, weight):
    elements, prompts = chunk
    return rl_update.local_gradients(
        quadratic, lambda t: t, trainable, None, elements, weight, lambda p: (), prompts
    )


def run(elements, weights, ema=EVERY_UPDATE):
    optimizer = optax.sgd(RATE)
    state = rl_update.init_state({"w": jnp.zeros(())}, optimizer)
    prompts = jnp.zeros(weights.shape, jnp.int32)
    return rl_update.update(
        optimizer, ema, gradients, state, (elements, prompts), weights
    )


def test_one_step_is_the_weighted_mean_gradient():
    """Oracle: closed form of SGD on a quadratic, over two microbatches of two steps."""
    elements = jnp.arange(8.0).reshape(1, 2, 2, 2)  # update, batch, trained, slot
    weights = jnp.array([[[1.0, 0.0], [2.0, 1.0]]])
    state, info = run(elements, weights)
    each = np.broadcast_to(weights[0][:, None], (2, 2, 2))
    mean = (each * np.arange(8.0).reshape(2, 2, 2)).sum() / each.sum()
    np.testing.assert_allclose(state.trainable["w"], RATE * 2 * mean, rtol=1e-6)
    expected = (each * np.arange(8.0).reshape(2, 2, 2) ** 2).sum() / each.sum()
    np.testing.assert_allclose(info["loss"][0], expected, rtol=1e-6)
    assert info["far_gap"][0] == 7.0


def test_later_chunks_see_the_earlier_steps():
    """Oracle: closed form, w_2 = w_1 + 2 rate (x - w_1)."""
    state, _ = run(jnp.ones((2, 1, 1, 1)), jnp.ones((2, 1, 1)))
    first = RATE * 2
    np.testing.assert_allclose(
        state.trainable["w"], first + RATE * 2 * (1 - first), rtol=1e-6
    )
    assert state.updates == 2


def test_batches_without_weight_are_not_computed():
    """Oracle: NaN in a skipped microbatch cannot reach anything."""
    elements = jnp.array([1.0, jnp.nan]).reshape(1, 2, 1, 1)
    state, info = run(elements, jnp.array([1.0, 0.0]).reshape(1, 2, 1))
    np.testing.assert_allclose(state.trainable["w"], 2 * RATE, rtol=1e-6)
    assert np.isfinite(info["loss"]).all()


def test_a_chunk_without_weight_changes_nothing():
    """Oracle: an invariance; not even the counters move."""
    state, _ = run(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1)))
    assert state.trainable["w"] == 0 and state.updates == 0


def test_ema_follows_the_official_schedule():
    """Oracle: flow_grpo.md 2.8, decay .470588 at k = 7, only every 8th update."""
    elements = jnp.ones((8, 1, 1, 1))
    state, _ = run(elements, jnp.ones((8, 1, 1)), rl_update.Ema(0.9, 8))
    reached = 1 - (1 - 2 * RATE) ** 8
    np.testing.assert_allclose(state.ema["w"], (1 - 0.470588) * reached, rtol=1e-5)
    state, _ = run(elements[:7], jnp.ones((7, 1, 1)), rl_update.Ema(0.9, 8))
    assert state.ema["w"] == 0


@pytest.mark.parametrize("name, first", [("adamw", 1.0), ("muon", 1 + 0.9 / 1.9)])
def test_optimizers_step(name, first):
    """Oracle: Adam's first step in closed form (Muon's Adam part is Nesterov's)."""
    params = {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones(3)}
    optimizer = rl_update.make_optimizer(
        1e-2, max_grad_norm=1.0, weight_decay=0.0, eps=1e-8, name=name
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all((u < 0).all() for u in jax.tree.leaves(updates))
    np.testing.assert_allclose(updates["bias"], -1e-2 * first, rtol=1e-3)
