"""GenEval by Flow-GRPO: prompts about objects, counts, colours and places.

Default: the embedded model, so that a laptop runs it with no download. Scores before
and after, of three seeds: docs/results.md. About 0.7 s an iteration on two CPU cores.
Command: python -m flowgrpo_jax.main --config=configs/geneval.py
Choose:  configs/geneval.py:recipe=flow_grpo (every step stochastic, as in the paper)
         configs/geneval.py:model=sd3.5-medium (the paper's run: 0.63 to 0.95 overall,
         arXiv 2505.05470, table 1, on 24 A800; not repeated here)
"""

from flowgrpo_jax import config as configs

SPRITES = {
    "recipe": "flow_grpo_fast_v1",
    "task": {
        "num_iterations": 400,
        "prompts_per_iteration": 32,
        "group_size": 16,
        "reward_options": {"geneval": {"extra_object_penalty": 0.35}},
        # Learning without guidance is half the price and moves the model itself;
        # scores are told with guidance and without.
        "sample.guidance_scale": 1.0,
        "eval.guidance_scale": 1.5,
        "eval.every": 100,
        "checkpoint.every": 100,
        # What reads the prompt and the time learns. What paints keeps its weights:
        # a policy gradient is mostly noise, and there it would show as a dotted
        # ground.
        "train.use_lora": False,
        "train.parameters": "add_|context|time_text",
        "train.learning_rate": 1e-4,
        "train.decay_iterations": 100,
        "train.adam_eps": 1e-10,
        "train.weight_decay": 0.0,
    },
}
LARGE = {
    "recipe": "flow_grpo",
    "task": {"num_iterations": 2000, "prompts": "coco", "eval.prompts": "coco"},
}


def get_config(arg=None):
    return configs.for_model(arg, sprites=SPRITES, large=LARGE)
