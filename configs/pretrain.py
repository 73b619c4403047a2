"""Pretraining of the embedded model: captioned scenes, flow matching.

Makes the weights that ship in flowgrpo_jax/sprites/weights.
Command: python -m flowgrpo_jax.main --config=configs/pretrain.py --workdir=runs/pretrain
"""

from flowgrpo_jax import config as configs


def get_config(arg=None):
    return configs.make(
        arg,
        recipe="pretrain",
        num_iterations=40_000,
        prompts_per_iteration=128,
        group_size=1,
        train__learning_rate=2e-3,
        train__weight_decay=0.0,
        train__warmup_iterations=100,
        train__decay_iterations=2_000,
        train__clean_iterations=38_000,
        train__ema_decay=0.998,
        train__ema_every=1,
        sample__eval_num_steps=20,
        sample__guidance_scale=1.0,
        eval__guidance_scale=2.5,
        eval__every=1_000,
        checkpoint__every=500,
        log__every=20,
    )
