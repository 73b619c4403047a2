"""Runs of the tiny model for tests: their config, a reward for it, and their rows."""

import numpy as np

from flowgrpo_jax import config as configs
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.runtime.metrics import read_metrics


def reward_spread(images, prompts):
    """A reward that random pictures differ in."""
    del prompts
    brightness = images.mean(axis=(1, 2, 3))
    return {"geneval": brightness, "accuracy": np.float32(brightness > 0.5)}


def use(patch, reward):
    """Let `reward` take the place of GenEval."""
    patch.setitem(registry.REWARDS, "geneval", lambda context, **options: reward)


def tiny_config(weights_file, **values):
    return configs.make(**{"model": weights_file} | _TINY | values)


_TINY = {
    "num_iterations": 4,
    "prompts_per_iteration": 2,
    "group_size": 4,
    "microbatch": 4,
    "mesh": {"data": 2},
    "sample__num_steps": 3,
    "sample__eval_num_steps": 2,
    "sample__guidance_scale": 1.0,
    "eval__guidance_scale": 1.0,
    "eval__every": 2,
    "eval__images_per_task": 1,
    "eval__final_images_per_task": 1,
    "checkpoint__every": 2,
    "log__tensorboard": False,
    "train__use_lora": False,
    "train__parameters": "attn|proj_out",
}


def rows(workdir):
    """All rows without the fields that tell time."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/")}
        for row in read_metrics(workdir)
    ]
