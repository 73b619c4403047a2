"""Layers that the transformers share: Dense with LoRA, norms in fp32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flowgrpo_jax.runtime.mesh import Shard

# flax asks an initializer for the shape of every parameter whenever a network is
# traced; under jit it is traced once per shape.
xavier_uniform = jax.jit(nn.initializers.xavier_uniform(), static_argnums=(1, 2))


class Dense(nn.Module):
    """Linear layer; with `lora_rank` it adds x @ A @ B * (alpha / rank).

    LoRA lives in a collection of its own, `lora`, in fp32, and acts on activations:
    folding it into the kernel would build a full-size gradient. Of a fused projection
    each of the `parts` has factors of its own (A [part, in, rank], B [part, rank,
    out / parts]), as PEFT has for to_q, to_k and to_v.
    """

    features: int
    parts: int = 1
    lora_rank: int = 0
    lora_alpha: float = 0.0
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable = xavier_uniform

    @nn.compact
    def __call__(self, x: Float[Array, "*batch input"]) -> Float[Array, "*batch out"]:
        inputs = x.shape[-1]
        kernel = self._kernel(inputs)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype)
        out = x @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        if self.lora_rank:
            rank, split = self.lora_rank, self.features // self.parts
            down_shape = (self.parts, inputs, rank)
            up_shape = (self.parts, rank, split)

            def gaussian():  # Flow-GRPO: A ~ N(0, 1 / rank^2), B = 0
                normal = jax.random.normal(self.make_rng("params"), down_shape)
                return normal / rank

            down = self.variable("lora", "a", gaussian).value.astype(self.dtype)
            up = self.variable("lora", "b", jnp.zeros, up_shape, jnp.float32)
            low = jnp.einsum("...i,pir->...pr", x, down)
            delta = jnp.einsum("...pr,pro->...po", low, up.value.astype(self.dtype))
            out = out + delta.reshape(out.shape) * (self.lora_alpha / rank)
        return out

    def _kernel(self, inputs: int) -> Any:
        """[input, out]; made whole here where devices share the parameters."""
        if self.has_variable("params", "kernel"):
            kernel: Any = self.get_variable("params", "kernel")
            if isinstance(kernel, Shard):
                return kernel.whole()
        return self.param("kernel", self.kernel_init, (inputs, self.features))


class LayerNorm(nn.Module):
    """Layer norm without weights; statistics in fp32."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch feature"]
    ) -> Float[Array, "*batch feature"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale; statistics in fp32."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch feature"]
    ) -> Float[Array, "*batch feature"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = (wide * wide).mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + 1e-6) * scale.astype(jnp.float32)
        return wide.astype(x.dtype)


def timestep_embedding(
    timestep: Float[Array, " sample"], features: int = 256
) -> Float[Array, "sample feature"]:
    """Cosines then sines of timestep * 10000^(-i/half), in fp32."""
    half = features // 2
    frequency = jnp.exp(-np.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timestep.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
