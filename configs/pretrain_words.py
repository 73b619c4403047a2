"""Pretraining of the embedded model of words: captioned words, flow matching.

As configs/pretrain.py: right captions teach all letters, then each letter of a picture is
another than its caption has with a known probability. The weights that
ship in flowgrpo_jax/worlds/words/weights were made by this file and a shorter second run with
more wrong letters; docs/words.md has both commands, their scores and cost.
Needs: the extra `ocr` for its scores.
Command: python -m flowgrpo_jax.main --config=configs/pretrain_words.py
"""

from flowgrpo_jax import config as configs


def get_config(arg=None):
    return configs.make(
        arg,
        recipe="pretrain",
        model="words",
        prompts="words",
        reward={"ocr": 1.0},
        reward_options={"ocr": {"detect": False}},
        num_iterations=2_400,
        prompts_per_iteration=64,
        group_size=1,
        microbatch=16,
        sample__eval_num_steps=20,
        sample__guidance_scale=1.0,
        train__caption_noise={"letter": 0.13},
        train__clean_iterations=1_400,
        train__learning_rate=2e-3,
        train__weight_decay=0.0,
        train__warmup_iterations=100,
        train__decay_iterations=1_000,
        train__ema_decay=0.998,
        train__ema_every=1,
        eval__prompts="words",
        eval__guidance_scale=1.0,
        eval__every=500,
        eval__final_images_per_task=400,
        checkpoint__every=500,
        log__every=20,
    )
