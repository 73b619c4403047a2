"""Layers against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.models.layers import Dense, LayerNorm, RMSNorm


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("parts", [1, 3])
def test_dense_with_lora(parts):
    """Oracle: float64; x W + b + (alpha / rank) x A_p B_p, part by part."""
    rank, alpha, split = 2, 5.0, 4
    x = normal(2, 7, 6)
    kernel, bias = normal(6, parts * split, seed=1), normal(parts * split, seed=2)
    a, b = normal(parts, 6, rank, seed=3), normal(parts, rank, split, seed=4)
    layer = Dense(parts * split, parts=parts, lora_rank=rank, lora_alpha=alpha)
    found = layer.apply(
        {"params": {"kernel": kernel, "bias": bias}, "lora": {"a": a, "b": b}}, x
    )
    x, kernel, bias, a, b = wide(x, kernel, bias, a, b)
    low = [x @ a[p] @ b[p] for p in range(parts)]
    expected = x @ kernel + bias + alpha / rank * np.concatenate(low, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_dense_types():
    """Oracle: the type rules; parameters fp32, the product in the layer's dtype."""
    layer = Dense(4, lora_rank=2, lora_alpha=1.0, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), normal(3, 6))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert layer.apply(variables, normal(3, 6)).dtype == jnp.bfloat16


def test_lora_gradient_is_small():
    """Closed form: at B = 0 only B has a gradient, A's is zero."""
    layer = Dense(4, lora_rank=2, lora_alpha=1.0)
    variables = layer.init(jax.random.key(0), normal(3, 6))
    grads = jax.grad(
        lambda lora: layer.apply(variables | {"lora": lora}, normal(3, 6)).sum()
    )(variables["lora"])
    assert (grads["a"] == 0).all() and (grads["b"] != 0).all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm(offset):
    """Oracle: float64; also where the mean is far larger than the deviation."""
    x = normal(3, 5, 16) + offset
    (big,) = wide(x)
    centred = big - big.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(LayerNorm().apply({}, x), expected, atol=1e-4)


def test_rms_norm():
    """Oracle: float64, with a scale."""
    x, scale = normal(3, 5, 16), normal(16, seed=1)
    found = RMSNorm().apply({"params": {"scale": scale}}, x)
    x, scale = wide(x, scale)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm()])
def test_norm_statistics_are_fp32(norm):
    """Oracle: fp32 of the same bf16 input, rounded once at the end."""
    x = jnp.asarray(normal(4, 512), jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    narrow = norm.apply(variables, x)
    assert narrow.dtype == jnp.bfloat16
    exact = norm.apply(variables, x.astype(jnp.float32))
    np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16))
