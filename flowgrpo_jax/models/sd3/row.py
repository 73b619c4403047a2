"""The row of Stable Diffusion 3 and 3.5: names and defaults, without networks."""

from flowgrpo_jax.models.family import Family
from flowgrpo_jax.models.sd3.presets import HUB_IDS

ROW = Family(
    name="sd3",
    module="flowgrpo_jax.models.sd3.family",
    aliases=HUB_IDS,
    class_names=("SD3Transformer2DModel",),
    trained_as="sd3.5-medium",
    # What Flow-GRPO trained SD3.5-M with, whatever the task (arXiv 2505.05470, its code).
    defaults={
        "resolution": 512,
        "max_sequence_length": 128,
        "dtype": "bfloat16",
        # Memory; and a block whose insides are not kept is the same program in rollout
        # and update, whatever the compiler fuses: the first ratio is exactly 1.
        "remat": "full",
        "train.use_lora": True,
        "train.lora_rank": 32,
        "train.lora_alpha": 64.0,
        "train.learning_rate": 3e-4,
        "sample.schedule": "model",
        "sample.shift": 0.0,
        "eval.guidance_scale": 4.5,
        "eval.every": 60,
        "checkpoint.every": 60,
    },
    # Of diffusers' StableDiffusion3Pipeline.
    sampling={
        "sample.eval_num_steps": 28,
        "eval.guidance_scale": 7.0,
        "resolution": 0,
        "max_sequence_length": 256,
    },
)
