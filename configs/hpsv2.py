"""HPSv2.1 and CLIP score on FLUX.1-dev by G2RPO, as its authors ran it.

All twelve billion weights at 2e-6, 720 x 720 pixels, guidance 3.5, 16 steps, 12
members, branches at the first 8 steps, 16 prompts an iteration, 301 iterations.
Expected: HPS 0.305 to 0.376 and CLIP 0.388 to 0.406 on HPDv2's 400 test prompts (arXiv
2510.01982, on 16 H200; not repeated here).
Needs: FLUX.1-dev from the hub; HPSv2.1 and DFN's ViT-H/14, which are published as
pickles, converted into reward_models (docs/rewards.md says how); prompts of HPDv2, one
a line, in dataset/hpsv2: train.txt is prompts.txt of DanceGRPO's repository, of which
the authors take the first 50,000 without Chinese, test.txt is data/prompts_test.txt of
MixGRPO's.
Command: python -m flowgrpo_jax.main --config=configs/hpsv2.py
Choose:  configs/hpsv2.py:recipe=g2rpo_released (granularities 1 and 2: a fifth less)
         configs/hpsv2.py:recipe=dance_grpo, or mix_grpo (what G2RPO is compared with)
LoRA:    for less than sixteen devices of 141 GB, at thirty times the rate, as
         DanceGRPO's two FLUX runs differ (1e-5 and 3e-4; not tuned for G2RPO):
         --config.train.use_lora=True --config.train.learning_rate=6e-5
         --config.mesh.data=-1 --config.mesh.fsdp=1
"""

from flowgrpo_jax import config as configs

LARGE = {
    "model": "flux.1-dev",
    "recipe": "g2rpo",
    "task": {
        "prompts": "dataset/hpsv2/train.txt",
        "eval.prompts": "dataset/hpsv2/test.txt",
        "reward": {"hpsv2": 1.0, "clipscore": 1.0},
        "reward_options": {
            "hpsv2": {"weights": "reward_models/HPS_v2.1.safetensors"},
            "clipscore": {
                "weights": "reward_models/DFN5B-CLIP-ViT-H-14.safetensors",
                "processor": "apple/DFN5B-CLIP-ViT-H-14",
                "cosine": True,
            },
        },
        # Each reward compared within its groups, then added: also where a recipe had
        # one reward alone and so leaves this open.
        "train.reward_combination": "advantage",
        # Of all steps of a prompt G2RPO trains eight, once for all members.
        "microbatch": 4,
        # Weights and their optimizer take 16 bytes each: split over all devices.
        "mesh": {"data": 1, "fsdp": -1},
        "sample.eval_num_steps": 50,
        "eval.every": 50,
        "checkpoint.every": 50,
    },
}


def get_config(arg=None):
    return configs.for_model(arg, large=LARGE)
