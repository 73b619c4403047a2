"""Folding an adapter into the base gives the same network."""

import jax
import numpy as np

from flowgrpo_jax.models import lora
from tests.tiny import tiny_model

RANK = 4


def test_folded_velocity():
    """Oracle: an invariance; base with adapter = folded base, to fp32 rounding."""
    model, variables = tiny_model(RANK)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *model.latent_shape)).astype(np.float32)
    sigma = np.array([0.9, 0.4], np.float32)
    ids = model.tokenizer(["a red circle", "two rings"])
    velocity = jax.jit(model.velocity)
    adapted = velocity(variables, latents, sigma, ids)
    folded = lora.fold(variables, model.denoiser.lora_alpha)
    assert "lora" not in folded
    np.testing.assert_allclose(
        velocity(folded, latents, sigma, ids), adapted, rtol=1e-4, atol=1e-4
    )
    base = {name: tree for name, tree in variables.items() if name != "lora"}
    assert np.abs(velocity(base, latents, sigma, ids) - adapted).max() > 1e-2


def test_fused_parts_stand_side_by_side():
    """Closed form: the kernel of part p gets A_p @ B_p * alpha / rank, per layer."""
    rng = np.random.default_rng(0)
    kernel, a, b = (
        rng.standard_normal(shape)
        for shape in [(2, 5, 12), (2, 3, 5, RANK), (2, 3, RANK, 4)]
    )
    variables = {
        "transformer": {"qkv": {"kernel": kernel, "bias": np.ones(12)}},
        "text": {"words": np.ones(2)},
        "lora": {"qkv": {"a": a, "b": b}},
    }
    folded = lora.fold(variables, alpha=8.0)
    for layer in range(2):
        for part in range(3):
            columns = slice(4 * part, 4 * part + 4)
            np.testing.assert_allclose(
                folded["transformer"]["qkv"]["kernel"][layer, :, columns],
                kernel[layer, :, columns] + 2.0 * a[layer, part] @ b[layer, part],
            )
    np.testing.assert_array_equal(folded["transformer"]["qkv"]["bias"], np.ones(12))
    assert folded["text"] is variables["text"]
    assert variables["transformer"]["qkv"]["kernel"] is kernel  # not changed in place


def test_without_adapter():
    """Oracle: the contract; nothing to fold, nothing changes."""
    variables = {"transformer": {}, "text": {}}
    assert lora.fold(variables, 1.0) is variables
