"""Pretraining of the embedded model: captioned scenes, flow matching.

Clean captions teach the model everything, then a known share of wrong ones teaches it
how far to trust a caption. About 1.5 hours on two CPU cores. The weights that ship in
flowgrpo_jax/worlds/sprites/weights were made by two runs of this file that add up to its
number of iterations; docs/results.md has their commands and scores.
Command: python -m flowgrpo_jax.main --config=configs/pretrain.py
"""

from flowgrpo_jax import config as configs

# The share of captions whose picture shows something else; see worlds/sprites/scenes.py.
CAPTION_NOISE = {
    "single_object": 0.10,
    "two_object": 0.35,
    "counting": 0.45,
    "colors": 0.25,
    "position": 0.50,
    "color_attr": 0.45,
}


def get_config(arg=None):
    return configs.make(
        arg,
        recipe="pretrain",
        num_iterations=20_500,
        prompts_per_iteration=128,
        group_size=1,
        sample__eval_num_steps=20,
        sample__guidance_scale=1.0,
        train__caption_noise=CAPTION_NOISE,
        train__clean_iterations=19_000,
        train__learning_rate=2e-3,
        train__weight_decay=0.0,
        train__warmup_iterations=100,
        train__decay_iterations=4_500,
        train__ema_decay=0.998,
        train__ema_every=1,
        eval__guidance_scale=1.5,
        eval__every=1_000,
        eval__final_images_per_task=48,
        checkpoint__every=500,
        log__every=20,
    )
