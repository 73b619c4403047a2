"""Formulas of cost against published counts and against this package's networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from flowgrpo_jax.cost import flops
from flowgrpo_jax.models import operations
from flowgrpo_jax.models.sd3 import cost, presets
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.transformer import MMDiT, MMDiTConfig
from flowgrpo_jax.runtime import mesh as meshes

MEDIUM, LARGE = (
    MMDiTConfig.from_dict(presets.TRANSFORMERS[name])
    for name in ("sd3.5-medium", "sd3.5-large")
)


@pytest.mark.parametrize(
    "config, image, text, tera, share",
    [
        (MEDIUM, 1024, 205, 2.224, 0.14),
        (MEDIUM, 1024, 333, 2.443, None),
        (MEDIUM, 4096, 333, 11.25, 0.38),
        (LARGE, 1024, 205, 7.176, 0.08),
        (LARGE, 1024, 333, 7.978, None),
        (LARGE, 4096, 333, 31.12, 0.23),
    ],
)
def test_forward(config, image, text, tera, share):
    """Oracle: torch's FlopCounterMode over diffusers' classes, counted elsewhere."""
    forward = cost.forward(config, image, text)
    assert forward.total / flops.TERA == pytest.approx(tera, rel=1e-3)
    if share:
        assert forward.attention / forward.total == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("side, tera", [(64, 2.515), (128, 10.47)])
def test_decode(side, tera):
    """Oracle: torch's FlopCounterMode over diffusers' AutoencoderKL, as above."""
    made = operations.vae_decode(
        side, side, latent_channels=16, widths=(128, 256, 512, 512), layers=2
    )
    assert made / flops.TERA == pytest.approx(tera, rel=1e-3)


@pytest.mark.parametrize(
    "config, options, tera",
    [
        (MEDIUM, {"lora": True}, 4.91),
        (MEDIUM, {"lora": True, "references": 1}, 7.13),
        (MEDIUM, {"lora": False, "references": 1}, 9.05),
        (MEDIUM, {"lora": False, "references": 1, "remat": True}, 11.27),
        (LARGE, {"lora": False, "references": 1}, 29.0),
    ],
)
def test_trained_pass(config, options, tera):
    """Oracle: 2F + 1.5A (LoRA), 3F + 0.5A (full), +F each for reference and remat."""
    forward = cost.forward(config, 1024, 205)
    made = flops.trained_pass(forward, **options)
    assert made / flops.TERA == pytest.approx(tera, rel=2e-3)


def test_seconds():
    """Oracle: by hand; 240 passes of 2.224 TF at 197 TF/s, over one chip and eight."""
    forward = cost.forward(MEDIUM, 1024, 205)
    chip = flops.CHIPS["v5e"]
    assert flops.seconds(240 * forward.total, chip) == pytest.approx(2.71, rel=2e-3)
    assert flops.seconds(240 * forward.total, chip, 8) == pytest.approx(
        2.71 / 8, rel=2e-3
    )
    factors = [
        flops.head_factor(forward, flops.CHIPS[name], 64) for name in flops.CHIPS
    ]
    assert factors == pytest.approx([1.14, 1.14, 1.41, 1.41, 1, 1], abs=5e-3)


def test_saved_activations():
    """Oracle: by hand; 24 blocks of 1229 tokens of 1536 bf16 numbers are 0.09 GB.

    And 70 such arrays live in the block whose gradient is computed.
    """
    config = dataclasses.replace(MEDIUM, dtype=jnp.bfloat16, remat="full")
    kept = SD3Denoiser(config).kept_bytes(1229)
    assert kept / flops.GB == pytest.approx(0.0906 * (24 + 70) / 24, 1e-3)


@pytest.mark.parametrize("config, count", [(MEDIUM, 2243171520), (LARGE, 8056627520)])
def test_parameters(config, count):
    """Oracle: the sizes of diffusers' classes; nothing is allocated."""
    width = config.joint_attention_dim, config.pooled_projection_dim
    tree = jax.eval_shape(
        MMDiT(config).init,
        jax.random.key(0),
        jnp.zeros((1, 64, 64, 16)),
        jnp.ones(1),
        jnp.zeros((1, 7, width[0])),
        jnp.zeros((1, width[1])),
    )
    assert flops.parameters(tree) == count


def test_bytes_on_device():
    """Oracle: by hand; a quarter of one leaf and the whole of the other."""
    devices = np.array(jax.devices()[:4]).reshape(1, 4)
    mesh = Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * 2)
    tree = {
        "split": jax.ShapeDtypeStruct((6, 8), jnp.bfloat16),
        "whole": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    spec = {"split": PartitionSpec(None, "fsdp"), "whole": PartitionSpec()}
    placed = meshes.abstract(tree, spec, mesh)
    assert flops.bytes_on_device(placed) == 6 * 8 * 2 // 4 + 5 * 4
