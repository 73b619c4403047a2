"""The row of FLUX.1: names and defaults, without networks."""

from flowgrpo_jax.models.family import Family
from flowgrpo_jax.models.flux.presets import HUB_IDS

ROW = Family(
    name="flux",
    module="flowgrpo_jax.models.flux.family",
    aliases=HUB_IDS,
    class_names=("FluxTransformer2DModel",),
    trained_as="flux.1-dev",
    # What a recipe leaves open is as Flow-GRPO trained FLUX.1-dev (arXiv 2505.05470, its
    # code): 512 pixels, LoRA; DanceGRPO and its descendants set their own.
    defaults={
        "resolution": 512,
        "max_sequence_length": 512,
        "dtype": "bfloat16",
        "remat": "full",
        "train.use_lora": True,
        "train.lora_rank": 64,
        "train.lora_alpha": 128.0,
        "train.learning_rate": 3e-4,
        "sample.schedule": "model",
        "sample.shift": 0.0,
        "sample.guidance_scale": 3.5,
        "eval.guidance_scale": 3.5,
        "eval.every": 60,
        "checkpoint.every": 60,
    },
    # Of diffusers' FluxPipeline.
    sampling={
        "sample.eval_num_steps": 28,
        "eval.guidance_scale": 3.5,
        "resolution": 0,
        "max_sequence_length": 512,
    },
)
