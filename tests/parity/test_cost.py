"""Formulas of cost against torch's count over diffusers' networks, nothing allocated."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from flowgrpo_jax.models import operations
from flowgrpo_jax.models.sd3 import cost, presets
from flowgrpo_jax.models.sd3.transformer import MMDiTConfig

MEDIUM, LARGE = (
    MMDiTConfig.from_dict(presets.TRANSFORMERS[name])
    for name in ("sd3.5-medium", "sd3.5-large")
)
ODD = MMDiTConfig(num_layers=3, num_attention_heads=2, joint_attention_dim=96)


def counted(network, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [MEDIUM, LARGE, ODD], ids=["medium", "large", "odd"])
@pytest.mark.parametrize("rows, columns, text", [(64, 64, 205), (96, 168, 333)])
def test_transformer(config, rows, columns, text):
    """Oracle: FlopCounterMode over SD3Transformer2DModel on the meta device."""
    fields = {f.name for f in dataclasses.fields(config)}
    theirs = {
        name: getattr(config, name)
        for name in fields & set(SD3Transformer2DModel.__init__.__annotations__)
    }
    theirs |= {"caption_projection_dim": config.width, "qk_norm": config.qk_norm}
    theirs |= {"dual_attention_layers": config.dual_attention_layers}
    with torch.device("meta"):
        network = SD3Transformer2DModel(**theirs)
        want = counted(
            network,
            hidden_states=torch.empty(1, config.in_channels, rows, columns),
            encoder_hidden_states=torch.empty(1, text, config.joint_attention_dim),
            pooled_projections=torch.empty(1, config.pooled_projection_dim),
            timestep=torch.empty(1),
        )
    made = cost.forward(config, rows * columns // config.patch_size**2, text)
    assert made.total == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("rows, columns", [(64, 64), (96, 40)])
@pytest.mark.parametrize("widths, layers", [((128, 256, 512, 512), 2), ((32, 64), 1)])
def test_decode(widths, layers, rows, columns):
    """Oracle: FlopCounterMode over AutoencoderKL's decoder on the meta device."""
    with torch.device("meta"):
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=16,
            use_post_quant_conv=False,
        )
        want = counted(network.decoder, torch.empty(1, 16, rows, columns))
    made = operations.vae_decode(
        rows, columns, latent_channels=16, widths=widths, layers=layers
    )
    assert made == pytest.approx(want, rel=1e-3)
