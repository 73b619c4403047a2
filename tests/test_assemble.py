"""From the config to rewards that were tried before anything else is done."""

import os
import subprocess
import sys

import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.scoring import RewardFailure


@pytest.fixture
def seen(monkeypatch):
    """name -> the prompts of its calls; three rewards that may be asked for."""
    calls: dict[str, list] = {}

    def factory(name):
        def reward(images, prompts):
            calls.setdefault(name, []).append((images.shape[1:], list(prompts)))
            return {name: np.zeros(len(prompts))}

        return lambda context: reward

    for name in ("one", "two", "three"):
        monkeypatch.setitem(registry.REWARDS, name, factory(name))
    return calls


def test_each_reward_is_tried_once_on_prompts_that_it_will_see(seen):
    """Oracle: the calls; what only evaluations measure gets held-out prompts."""
    config = configs.make(
        reward={"one": 1.0, "two": 0.0}, eval__reward={"two": 1.0}, monitors=("three",)
    )
    context = assemble.try_rewards(config)
    train = assemble.load_prompt_set("sprites", "train")
    test = assemble.load_prompt_set("sprites", "test")
    for name, prompts in [("one", train), ("two", train), ("three", test)]:
        [(shape, asked)] = seen[name]
        assert asked == [prompts[0], prompts[-1]] and shape == (24, 24, 3)
        assert registry.make(name, context) is context.made[name]
    seen.clear()
    assemble.try_rewards(config, training=False, monitored=False)
    assert list(seen) == ["two"]
    assert seen["two"][0][1] == [test[0], test[-1]]


@pytest.mark.parametrize("where", ["reward", "eval__reward", "monitors"])
def test_a_run_whose_reward_fails_does_not_begin(where, tmp_path, monkeypatch):
    """Oracle: the line; no model is loaded for it, and no workdir is made."""

    def broken(images, prompts):
        raise SystemExit(1)

    def loaded(*_):
        raise AssertionError("a model was loaded first")

    monkeypatch.setitem(registry.REWARDS, "broken", lambda context: broken)
    monkeypatch.setattr(assembled, "starting_model", loaded)
    value = ("broken",) if where == "monitors" else {"broken": 1.0}
    config = configs.make(**{where: value})
    with pytest.raises(RewardFailure, match="^reward.broken: SystemExit: 1$"):
        trainer.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_monitors_are_made_with_them(seen):
    """Oracle: how the lines begin, by hand; before any model."""
    for values, line in [
        ({"monitors": ("thre",)}, "monitors: thre: must be one of"),
        (
            {
                "monitors": ("clip_diversity",),
                "reward_options": {"clip_diversity": {"nosuch": 1}},
            },
            "reward: clip_diversity: options",
        ),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            assemble.try_rewards(configs.make(reward={"one": 1.0}, **values))


HIDING = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
def even(images, prompts):
    return [0.0] * len(images)
"""
DEVICES = """
import jax
from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
assemble.try_rewards(configs.make(reward={"hiding.even": 1.0}))
print(jax.device_count())
"""


def test_a_reward_does_not_choose_the_devices_of_the_run(tmp_path):
    """Oracle: one device, as without the flags that its module sets."""
    (tmp_path / "hiding.py").write_text(HIDING)
    paths = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""},
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
