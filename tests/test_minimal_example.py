"""examples/minimal_flow_grpo.py: plain loops and the engine give the same numbers."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy

SEED, ITERATIONS = 3, 12


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "minimal_flow_grpo.py"
    spec = importlib.util.spec_from_file_location("minimal_flow_grpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_shows_the_reward_rising(example, capsys):
    """Oracle: the toy's target; the mean comes near it, the reward above half way."""
    example.main(iterations=20)
    rows = re.findall(r"reward +(-[\d.]+) +mean \[(.+)\]", capsys.readouterr().out)
    rewards = [float(reward) for reward, _ in rows]
    assert len(rewards) == 20 and np.mean(rewards[-3:]) > rewards[0] / 2
    last = np.array(rows[-1][1].split(), float)
    np.testing.assert_allclose(last, example.TARGET, atol=0.2)


def test_the_engine_gives_the_same_numbers(example, monkeypatch):
    """Oracle: the example; the trainer's own programs on the same flow and values.

    Rewards and the mean are float32 of order 1, which rounds at 6e-8. What is compiled
    in other pieces rounds otherwise, and 24 updates pass a few roundings on.
    """
    run = toy.make_run(
        monkeypatch,
        "flow_grpo",
        seed=SEED,
        prompts_per_iteration=example.PROMPTS,
        group_size=example.GROUP_SIZE,
        updates_per_iteration=example.UPDATES,
        microbatch=32,
        sample__schedule="shifted",
        sample__shift=example.SHIFT,
        sample__num_steps=example.NUM_STEPS,
        sample__noise_level=example.NOISE_LEVEL,
        train__learning_rate=example.LEARNING_RATE,
        train__clip_range=example.CLIP.low,
        train__max_grad_norm=0.0,
        train__beta=0.0,
    )
    state, mean = run.initial_state(), jnp.zeros(2)
    optimizer_state = example.OPTIMIZER.init(mean)
    for iteration in range(ITERATIONS):
        state, metrics = run.step(state, iteration)
        mean, optimizer_state, reward = example.iterate(
            mean, optimizer_state, SEED, iteration
        )
        np.testing.assert_allclose(metrics["reward_avg"], reward, rtol=3e-7)
        (trained,) = jax.tree.leaves(state.trainable)
        np.testing.assert_allclose(trained, mean, rtol=0, atol=3e-7)
    assert mean.min() > 0.4  # it has learnt
