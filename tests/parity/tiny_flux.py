"""A whole FluxPipeline of random weights, small enough for tests; see `tiny_sd3`."""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from tests.parity import tiny_sd3

# What tells the released models apart.
KINDS = {
    "dev": ({"guidance_embeds": True}, {"shift": 3.0, "use_dynamic_shifting": True}),
    "schnell": ({"guidance_embeds": False}, {"shift": 1.0}),
}
CLIP_WIDTH = 16


def write_pipeline(
    folder: str | Path, seed: int = 0, kind: str = "dev"
) -> FluxPipeline:
    """Make a random pipeline of one `kind`, `save_pretrained` it, and return it."""
    network, scheduler = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = tiny_sd3.vae()
        vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
        pipeline = FluxPipeline(
            transformer=tiny_sd3.randomize(transformer(**network)),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=tiny_sd3.randomize(vae),
            text_encoder=tiny_sd3.randomize(clip_text()),
            tokenizer=tiny_sd3.clip_tokenizer("<|endoftext|>"),
            text_encoder_2=tiny_sd3.randomize(tiny_sd3.t5()),
            tokenizer_2=tiny_sd3.t5_tokenizer(),
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def transformer(**options) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny_sd3.T5,
        pooled_projection_dim=CLIP_WIDTH,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny_sd3.clip_tokenizer("!")),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act="quick_gelu",
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
