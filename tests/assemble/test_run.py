"""What a run holds in memory."""

import gc
import math

import jax
import jax.numpy as jnp

from flowgrpo_jax.assemble import run as assembled
from tests.tiny_run import reward_spread, tiny_config, use


def test_what_learns_whole_is_held_as_often_as_the_state_says(
    weights_file, monkeypatch
):
    """Oracle: by counting; the weights it began with are no further copy.

    Of weights that learn the budget lists the learner, the EMA and the moments.
    """
    use(monkeypatch, reward_spread)
    load = assembled.starting_model

    def on_the_device(*arguments):  # as the weights of a large model are
        model, variables = load(*arguments)
        return model, jax.tree.map(jnp.array, variables)

    monkeypatch.setattr(assembled, "starting_model", on_the_device)
    config = tiny_config(weights_file, mesh={"data": 1}, train__parameters="")
    config.train.beta = 0.0  # no comparison with the base model, which keeps it too
    # What other tests hold: kept in this list, so that no id is taken again.
    held_before = jax.live_arrays()
    earlier = {id(leaf) for leaf in held_before}
    run = assembled.Run(config)
    state = run.initial_state()
    run.forget_base()
    gc.collect()
    shape = max(
        (leaf.shape for leaf in jax.tree.leaves(state.trainable)), key=math.prod
    )
    alive = [
        leaf
        for leaf in jax.live_arrays()
        if leaf.shape == shape and id(leaf) not in earlier
    ]
    listed = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == shape]
    assert len(listed) % 4 == 0 and len(alive) == len(listed)
