"""Attention: every kind against float64, and which kind a device gets."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.attention import attention, choose, splash_block


def heads(samples=2, tokens=6, count=3, depth=4):
    rng = np.random.default_rng(0)
    shape = (3, samples, tokens, count, depth)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32))


def by_head(query, key, value):
    """softmax(q k / sqrt(depth)) v in float64, head by head, heads joined."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    samples, tokens, count, depth = query.shape
    out = np.empty((samples, tokens, count * depth))
    for n, head in np.ndindex(samples, count):
        score = query[n, :, head] @ key[n, :, head].T / np.sqrt(depth)
        share = np.exp(score - score.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        out[n, :, depth * head : depth * (head + 1)] = share @ value[n, :, head]
    return out


@pytest.mark.parametrize("kind", ["xla", "reference"])
def test_attention(kind):
    """Oracle: float64."""
    given = heads()
    np.testing.assert_allclose(attention(*given, kind), by_head(*given), atol=1e-5)


def test_tpu_kernel():
    """Oracle: plain XLA, forward and backward; tokens that need padding, depth 64.

    The kernel runs in Pallas's interpreter.
    """
    given = heads(samples=1, tokens=130, count=1, depth=64)

    def results(kind):
        def loss(*given):
            out = attention(*given, kind)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = jax.jit(grad)(*given)
        return out, *grads

    for found, expected in zip(
        results("splash_interpreted"), results("xla"), strict=True
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=2e-5 * scale)


@pytest.mark.parametrize(
    "tokens, block, padded",
    [(1, 128, 128), (200, 256, 256), (512, 512, 512), (1229, 640, 1280)]
    + [(1357, 768, 1536), (4429, 896, 4480)],
)
def test_splash_block(tokens, block, padded):
    """By hand: at least the tokens, in whole tiles, with the least padding."""
    assert splash_block(tokens) == block
    assert -(-tokens // block) * block == padded


@pytest.mark.parametrize(
    "platform, capability, dtype, depth, kind",
    [
        ("cpu", None, jnp.bfloat16, 64, "xla"),
        ("tpu", None, jnp.bfloat16, 64, "splash"),
        ("gpu", "9.0", jnp.bfloat16, 64, "cudnn"),
        ("gpu", "8.0", jnp.float16, 128, "cudnn"),
        ("gpu", "9.0", jnp.float32, 64, "xla"),  # cuDNN has no fp32
        ("gpu", "9.0", jnp.bfloat16, 160, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 36, "xla"),
        ("gpu", "7.5", jnp.bfloat16, 64, "xla"),
        ("gpu", "gfx942", jnp.bfloat16, 64, "xla"),
    ],
)
def test_choice(platform, capability, dtype, depth, kind):
    """By hand: what each kernel takes."""
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    assert choose(device, dtype, depth) == kind


def test_unknown_kind():
    """Oracle: the contract; one line with what is allowed."""
    with pytest.raises(UserError, match="attention: flash: must be one of xla, cudnn"):
        attention(*heads(), "flash")
