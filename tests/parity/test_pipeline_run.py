"""Learning on a pipeline folder that diffusers wrote: bf16, guidance, JPEG size."""

import json

import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.runtime.metrics import read_metrics
from tests.parity.test_pipeline import pipeline  # noqa: F401
from tests.tiny_run import rows

WORDS = ("open", "stop", "hello", "exit")
RESULTS = {
    "lora": "pytorch_lora_weights.safetensors",
    "full": "transformer/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f'a sign that says "{word}"\n' for word in WORDS))
    return str(path)


def config_of(folder, prompts, kind, iterations):
    config = configs.make(
        f"model={folder}",
        resolution=64,
        max_sequence_length=16,
        embedding_cache=f"{prompts}.cache",
        prompts=prompts,
        reward={"jpeg_compressibility": 1.0},
        num_iterations=iterations,
        prompts_per_iteration=2,
        group_size=8,
        microbatch=8,
        mesh={"data": 1},
        eval__prompts=prompts,
        eval__every=0,
        eval__images_per_task=4,
        eval__final_images_per_task=4,
        eval__guidance_scale=1.0,
        eval__sde=False,
        sample__num_steps=3,
        sample__eval_num_steps=2,
        checkpoint__every=2,
        log__tensorboard=False,
        train__use_lora=kind == "lora",
        train__learning_rate=1e-2 if kind == "lora" else 1e-3,
        train__ema_every=1,
    )
    assert config.dtype == "bfloat16" and config.sample.guidance_scale == 4.5
    return config


def killed(self, state, iteration):
    if iteration == 3:
        raise KeyboardInterrupt
    return STEP(self, state, iteration)


STEP = trainer.Run.step


@pytest.mark.parametrize("kind", RESULTS)
def test_run(pipeline, prompts, tmp_path, monkeypatch, kind):  # noqa: F811
    """Oracle: invariances. On-policy the ratio is 1, a killed run goes on as if

    nothing was; and the reward rises.
    """
    config = config_of(pipeline[1], prompts, kind, 12)
    quiet = tmp_path / "quiet"
    assert trainer.train(config, quiet)
    learned = [row for row in read_metrics(quiet) if row["kind"] == "train"]
    assert [row["ratio_gap"] for row in learned] == [0.0] * 12
    assert all(row["grad_norm"] > 0 for row in learned)
    reward = [row["reward_avg"] for row in learned]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + np.std(reward[:3])

    other = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "step", killed)
        trainer.train(config, other)
    assert rows(other)[-1]["iteration"] == 2
    assert trainer.train(config, other)
    assert json.dumps(rows(other)) == json.dumps(rows(quiet))
    found, wanted = ((path / RESULTS[kind]).read_bytes() for path in (other, quiet))
    assert found == wanted
