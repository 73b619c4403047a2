"""configs/hpsv2.py: every value that G2RPO, DanceGRPO and MixGRPO's authors give."""

import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks
from flowgrpo_jax.config.listing import listing

# Granular-GRPO, scripts/finetune/finetune_g2rpo_hps_clip.sh and train_g2rpo_hps_clip.py
# (arXiv 2510.01982); DanceGRPO, finetune_flux_grpo.sh (2505.07818) and MixGRPO,
# finetune_flux_grpo_MixGRPO.sh (2507.21802) share what is not below them.
SHARED = {
    "model": "flux.1-dev",
    "resolution": 720,
    "max_sequence_length": 512,
    "group_size": 12,
    "dtype": "bfloat16",
    "reward": {"hpsv2": 1.0, "clipscore": 1.0},
    "sample.shift": 3.0,
    "sample.schedule": "shifted",
    "sample.guidance_scale": 3.5,
    "sample.init_noise": "shared",
    "train.use_lora": False,
    "train.optimizer": "adamw",
    "train.weight_decay": 1e-4,
    "train.adam_eps": 1e-8,
    "train.max_grad_norm": 1.0,
    "train.warmup_iterations": 0,
    "train.decay_iterations": 0,
    "train.clip_range": 1e-4,
    "train.adv_clip_max": 5.0,
    "train.advantage_std": "group",
    "train.advantage_eps": 1e-8,
    "train.advantage_ddof": 1,
    "train.zero_advantage": "count",
    "train.beta": 0.0,
    "train.ema": False,
}
G2RPO = {
    "seed": 42,
    "num_iterations": 301,
    "prompts_per_iteration": 16,
    "sample.num_steps": 16,
    "sample.sde_type": "sde",
    "sample.noise_level": 0.7,
    "sample.branch_steps": tuple(range(8)),
    "sample.granularities": (1, 2, 3),
    "train.learning_rate": 2e-6,
    "train.advantage_key": "step",
    "train.reward_combination": "advantage",
    "train.update_order": "steps",
}
AUTHORS = {
    "g2rpo": G2RPO,
    "g2rpo_released": G2RPO | {"sample.granularities": (1, 2)},
    "dance_grpo": {
        "num_iterations": 300,
        "prompts_per_iteration": 16,
        "sample.num_steps": 16,
        "sample.sde_type": "dance",
        "sample.noise_level": 0.3,
        "train.learning_rate": 1e-5,
        "train.timestep_fraction": 0.6,
        "train.reward_combination": "advantage",
    },
    "mix_grpo": {
        "num_iterations": 300,
        "prompts_per_iteration": 32,
        "updates_per_iteration": 4,
        "sample.num_steps": 25,
        "sample.sde_type": "sde",
        "sample.noise_level": 0.7,
        "sample.sde_window_size": 4,
        "sample.window_every": 25,
        "train.reward_combination": "advantage_mean",
        "train.learning_rate": 1e-5,
    },
}


@pytest.mark.parametrize("recipe", AUTHORS)
def test_what_the_authors_ran(recipe):
    """Oracle: the tables above; nothing is remarked on, and no weights are asked for."""
    config = configs.load(f"configs/hpsv2.py:model=flux.1-dev,recipe={recipe}")
    for key, value in (SHARED | AUTHORS[recipe]).items():
        found = configs.get(config, key)
        assert (found.to_dict() if key == "reward" else found) == value, key
    checks.check(config)
    assert checks.remarks(config) == []
    assert "resolution = 720" in listing(config)


def test_the_default_is_g2rpo_on_flux():
    """Oracle: an invariance."""
    short, whole = (
        configs.load(f"configs/hpsv2.py{choice}").to_dict()
        for choice in ("", ":model=flux.1-dev,recipe=g2rpo")
    )
    assert short == whole
