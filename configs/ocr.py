"""Rendered text by Flow-GRPO: what is drawn is read by an OCR engine.

Default: the embedded world of words. Scores before and after, of three seeds:
docs/words.md.
Needs: the extra `ocr`.
Command: python -m flowgrpo_jax.main --config=configs/ocr.py
Choose:  configs/ocr.py:recipe=flow_grpo (every step stochastic, as in the paper)
         configs/ocr.py:model=sd3.5-medium (the paper's run: accuracy 0.59 to 0.92, arXiv
         2505.05470, table 2; not repeated here). Needs the prompts of the authors'
         repository in dataset/ocr (train.txt and test.txt).
"""

from flowgrpo_jax import config as configs

WORDS = {
    "recipe": "flow_grpo_fast_v1",
    "task": {
        "num_iterations": 60,
        "prompts": "words",
        "prompts_per_iteration": 16,
        "group_size": 16,
        "microbatch": 16,
        "reward": {"ocr": 1.0},
        "reward_options": {"ocr": {"detect": False}},
        "sample.guidance_scale": 1.0,
        "sample.eval_num_steps": 20,
        "eval.prompts": "words",
        "eval.guidance_scale": 1.0,
        "eval.every": 20,
        "eval.sde": False,
        "eval.final_images_per_task": 400,
        "checkpoint.every": 20,
        "train.use_lora": False,
        "train.parameters": "add_|context|time_text",
        "train.learning_rate": 1e-4,
        "train.decay_iterations": 20,
        "train.adam_eps": 1e-10,
        "train.weight_decay": 0.0,
    },
}
LARGE = {
    "recipe": "flow_grpo",
    "task": {
        "num_iterations": 2000,
        "prompts": "dataset/ocr/train.txt",
        "eval.prompts": "dataset/ocr/test.txt",
        "reward": {"ocr": 1.0},
    },
}


def get_config(arg=None):
    return configs.for_model(arg, words=WORDS, large=LARGE)
