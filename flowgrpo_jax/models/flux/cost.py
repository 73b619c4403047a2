"""What a pass through the transformer of FLUX.1 costs, by formula."""

from flowgrpo_jax.models.flux.transformer_config import FluxConfig
from flowgrpo_jax.models.operations import Pass


def forward(config: FluxConfig, image_tokens: int, text_tokens: int) -> Pass:
    """One forward pass of one image; see tests/parity/test_flux.py for torch's count."""
    width, both = config.width, image_tokens + text_tokens
    square = 2.0 * width**2  # one width x width matrix on one token
    block = 4 + 2 * config.mlp_ratio  # qkv, out and the two of the MLP
    double, single = config.num_layers, config.num_single_layers
    on_both = square * both * block * (double + single)
    ends = 2 * width * (config.in_channels + config.out_channels) * image_tokens
    text = 2 * width * config.joint_attention_dim * text_tokens
    modulation = square * (double * 12 + single * 3 + 2)
    embedders = 2 + config.guidance_embeds  # time, text, guidance: two layers each
    condition = 2.0 * width * (256 * (1 + config.guidance_embeds))
    condition += 2 * width * config.pooled_projection_dim + square * embedders
    return Pass(
        on_both + ends + text + modulation + condition,
        4.0 * width * both**2 * (double + single),
    )
