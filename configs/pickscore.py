"""PickScore by Flow-GRPO: what people prefer, on prompts that people wrote.

Expected: 21.72 to 23.31 on the test prompts (26 times the reward), DrawBench scores
kept by the KL (arXiv 2505.05470, table 2, on 24 A800; not repeated here, and its
authors tell no hours).
Needs: the prompts of the authors' repository in dataset/pickscore (train.txt and
test.txt) and the weights of SD3.5-M and of the reward, from the hub.
Command: python -m flowgrpo_jax.main --config=configs/pickscore.py
Choose:  configs/pickscore.py:recipe=flow_grpo_fast (a third of the cost)
"""

from flowgrpo_jax import config as configs

LARGE = {
    "recipe": "flow_grpo",
    "task": {
        "num_iterations": 2000,
        "prompts": "dataset/pickscore/train.txt",
        "eval.prompts": "dataset/pickscore/test.txt",
        "reward": {"pickscore": 1.0},
    },
    "by_recipe": {"flow_grpo": {"train.beta": 0.01}},
}


def get_config(arg=None):
    return configs.for_model(arg, large=LARGE)
