"""configs/hpsv2.py run on a small pipeline of FLUX.1 and small CLIPs of open_clip."""

import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.errors import UserError
from tests.parity import test_open_clip, tiny_flux
from tests.tiny_run import rows

LONG = "a photo of the red circle, " * 12


@pytest.fixture
def config(tmp_path):
    """As the config says in all but sizes; prompts, models and weights are here."""
    flux, clip = tmp_path / "flux", tmp_path / "clip"
    clip.mkdir()
    tiny_flux.write_pipeline(flux)
    test_open_clip.write(clip)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a red circle\n{LONG}\n")
    config = configs.load(f"configs/hpsv2.py:model={flux},recipe=g2rpo")
    for name in ("hpsv2", "clipscore"):
        options = config.reward_options[name]
        options.weights = str(clip / "open_clip_model.safetensors")
        options.processor = str(clip)
    config.update(
        {
            "prompts": str(prompts),
            "embedding_cache": str(tmp_path / "cache"),
            "resolution": 32,
            "max_sequence_length": 16,
            "microbatch": 48,
            "num_iterations": 2,
            "prompts_per_iteration": 1,
            "mesh": {"data": 1, "fsdp": 1},
            "monitors": (),
            "eval": {
                "prompts": str(prompts),
                "every": 0,
                "final_images_per_task": 2,
                "sde": False,
            },
            "checkpoint": {"every": 2},
            "log": {"tensorboard": False},
        }
    )
    config.sample.eval_num_steps = 2
    return config


@pytest.mark.slow
def test_two_iterations(config, tmp_path, capfd):
    """Oracle: 1708 evaluations a prompt (docs/golden_numbers.md 9), eight updates of
    one state each, a first ratio of 1; and the prompts' lengths by hand."""
    assert trainer.train(config, tmp_path / "run")
    learned = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["nfe_rollout"] for row in learned] == [1708, 1708]
    assert [row["decoded_images"] for row in learned] == [289, 289]
    assert [row["nfe_update"] for row in learned] == [8, 8]
    assert [row["ratio_gap"] for row in learned] == [0.0, 0.0]
    for row in learned:
        for name in ("reward_hpsv2", "reward_clipscore"):
            assert np.isfinite(row[name]) and abs(row[name]) <= 1  # cosines
        assert row["grad_norm"] > 0
    told = capfd.readouterr().err
    for key in ("prompts", "eval.prompts"):
        assert (
            f"warning: {key}: 1 of 2 prompts lose tokens in CLIP-L and CLIP of the "
            "reward"
        ) in told
        assert f"warning: {key}: 1 of 2 prompts lose tokens in T5 (at most " in told


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"reward_options.hpsv2.weights": "reward_models/HPS_v2.1.safetensors"},
            "reward_options.hpsv2.weights: reward_models/HPS_v2.1.safetensors: no such "
            "file: docs/rewards.md says",
        ),
        (
            {"reward_options.clipscore.weights": "reward_models/DFN5B.safetensors"},
            "reward_options.clipscore.weights: .*DFN5B.safetensors: no such file: docs",
        ),
        ({"prompts": "dataset/hpsv2/train.txt"}, "^prompts: dataset/hpsv2/train.txt: "),
    ],
)
def test_what_is_missing_is_told(change, line, config, tmp_path):
    for key, value in change.items():
        configs.assign(config, key, value)
    with pytest.raises(UserError, match=line):
        trainer.train(config, tmp_path / "run")
