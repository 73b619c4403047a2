"""configs/hpsv2.py run on a small pipeline of FLUX.1 and small CLIPs of open_clip."""

import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax import train as trainer
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.config import checks
from flowgrpo_jax.errors import UserError
from tests.parity import test_open_clip, tiny_flux

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
            "eval": {"prompts": str(prompts)},
        }
    )
    return config


@pytest.mark.slow
@pytest.mark.more
def test_two_iterations(config, capsys):
    """Oracle: 1708 evaluations a prompt (docs/golden_numbers.md 9), eight updates of
    one state each, a first ratio of 1; and the prompts' lengths by hand."""
    checks.check(config)
    run = assembled.Run(config)
    told = capsys.readouterr().err
    for key in ("prompts", "eval.prompts"):
        lost = f"warning: {key}: 1 of 2 prompts lose tokens in"
        # Seven tokens each of twelve times, a start and an end. To CLIP-L "!" is a
        # word, the rewards' tokenizer here pads with it.
        rewards = "CLIP of the reward clipscore and CLIP of the reward hpsv2"
        for encoder in ("CLIP-L", rewards):
            assert f"{lost} {encoder} (at most 9 of 86 tokens cut), such as" in told
        assert f"{lost} T5 (at most " in told
    state = run.initial_state()
    for iteration in range(2):
        state, metrics = run.step(state, iteration)
        assert metrics["nfe_rollout"] == 1708 and metrics["nfe_update"] == 8
        assert metrics["decoded_images"] == 289 and metrics["ratio_gap"] == 0.0
        for name in ("reward_hpsv2", "reward_clipscore"):
            assert np.isfinite(metrics[name]) and abs(metrics[name]) <= 1  # cosines
        assert metrics["grad_norm"] > 0


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
        (
            {"prompts": "dataset/hpsv2/train.txt"},
            "^prompts: dataset/hpsv2/train.txt: cannot be read .*: a config says at its top",
        ),
    ],
)
def test_what_is_missing_is_told(change, line, config, tmp_path):
    for key, value in change.items():
        configs.assign(config, key, value)
    with pytest.raises(UserError, match=line):
        trainer.train(config, tmp_path / "run")
