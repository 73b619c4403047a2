"""Training on a pipeline folder that diffusers wrote: bf16, guidance, JPEG size."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import run as assembled
from tests.parity.test_pipeline import pipeline  # noqa: F401
from tests.tiny_run import rows

WORDS = ("open", "stop", "hello", "exit")
WEIGHTS = "pytorch_lora_weights.safetensors"
STEP = assembled.Run.step


def config_of(folder, prompts, recipe="flow_grpo", **values):
    """A short run on a folder: a JPEG reward, one update an iteration."""
    defaults = {
        "resolution": 64,
        "max_sequence_length": 16,
        "embedding_cache": f"{prompts}.cache",
        "prompts": str(prompts),
        "reward": {"jpeg_compressibility": 1.0},
        "num_iterations": 6,
        "prompts_per_iteration": 4,
        "group_size": 16,
        "updates_per_iteration": 1,
        "microbatch": 8,
        "mesh": {"data": 1},
        "eval__prompts": str(prompts),
        "eval__every": 0,
        "eval__images_per_task": 4,
        "eval__final_images_per_task": 4,
        "eval__guidance_scale": 1.0,
        "eval__sde": False,
        "sample__num_steps": 3,
        "sample__eval_num_steps": 2,
        "checkpoint__every": 2,
        "log__tensorboard": False,
        "train__beta": 0.0,
        "train__ema_every": 1,
    }
    config = configs.make(f"model={folder},recipe={recipe}", **defaults | values)
    assert config.dtype == "bfloat16" and config.remat == "full"
    return config


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f'a sign that says "{word}"\n' for word in WORDS))
    return path


def killed(self, state, iteration):
    if iteration == 3:
        raise KeyboardInterrupt
    return STEP(self, state, iteration)


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.parametrize(
    "values",
    [
        {"train__use_lora": False, "train__learning_rate": 1e-2},
        {"train__use_lora": True, "train__learning_rate": 1e-1},
    ],
    ids=["full", "lora"],
)
def test_reward_rises(pipeline, prompts, tmp_path, values):  # noqa: F811
    """Oracle: the spread of the images; and every first ratio is 1."""
    config = config_of(pipeline[1], prompts, num_iterations=40, **values)
    assert_reward_rises(config, tmp_path / "run")


def assert_reward_rises(config, workdir):
    """By five standard errors from the first five iterations to the last."""
    assert trainer.train(config, workdir)
    learned = [row for row in rows(workdir) if row["kind"] == "train"]
    assert [row["ratio_gap"] for row in learned] == [0.0] * 40
    reward = np.array([row["reward_avg"] for row in learned])
    print(f"reward {reward[:5].mean():.5f} before, {reward[-5:].mean():.5f} after")
    error = learned[0]["reward_std_mean"] / np.sqrt(4 * 16)  # of an iteration's mean
    assert reward[-5:].mean() - reward[:5].mean() > 5 * error


@pytest.mark.slow
@pytest.mark.more
def test_a_killed_run_goes_on(pipeline, prompts, tmp_path, monkeypatch):  # noqa: F811
    """Oracle: an invariance; a killed run of LoRA goes on as if nothing was."""
    config = config_of(
        pipeline[1], prompts, train__use_lora=True, train__learning_rate=1e-2
    )
    quiet, other = tmp_path / "quiet", tmp_path / "other"
    assert trainer.train(config, quiet)
    gaps = [row["ratio_gap"] for row in rows(quiet) if row["kind"] == "train"]
    assert gaps == [0.0] * 6

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembled.Run, "step", killed)
        trainer.train(config, other)
    assert rows(other)[-1]["iteration"] == 2
    assert trainer.train(config, other)
    assert json.dumps(rows(other)) == json.dumps(rows(quiet))
    found, wanted = (load_file(folder / WEIGHTS) for folder in (other, quiet))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
