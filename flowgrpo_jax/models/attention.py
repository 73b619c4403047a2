"""Attention as one function; which kernel carries it out is chosen once, at build.

Rollout and update must use the same one: kernels differ in their last bits. So the
choice is a field of the network's config, made by `choose` and never at run time.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flowgrpo_jax.errors import not_one_of

# xla: scores of all heads are written to memory. cudnn: flash attention of NVIDIA's
# library. splash: a Pallas kernel for TPU. splash_interpreted: the same on any
# machine, slowly, for tests. reference: the definition, for tests.
KINDS = ("xla", "cudnn", "splash", "splash_interpreted", "reference")
LANES = 128  # of a TPU's vector unit: tokens come in multiples of it
# Under this name rematerialisation policies find what attention returned.
SAVED = "attention"


def choose(device: Any, dtype: DTypeLike, depth: int) -> str:
    """The fastest kind for heads of this depth on devices like this one.

    Flash attention of cuDNN takes 16-bit types, heads of at most 128 features in
    multiples of 8, and Ampere or newer.
    """
    if getattr(device, "platform", None) == "tpu":
        return "splash"
    # AMD's GPUs answer "gfx..." here.
    capability = str(getattr(device, "compute_capability", ""))
    recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8.0
    narrow = jnp.dtype(dtype).itemsize == 2
    return "cudnn" if recent and narrow and depth <= 128 and depth % 8 == 0 else "xla"


def attention(
    query: Float[Array, "sample token head depth"],
    key: Float[Array, "sample token head depth"],
    value: Float[Array, "sample token head depth"],
    kind: str = "xla",
) -> Float[Array, "sample token feature"]:
    """Full softmax attention over all tokens; heads are joined in the result."""
    if kind == "reference":
        mixed = _reference(query, key, value)
    elif kind == "xla":
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="xla")
    elif kind == "cudnn":
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    elif kind in ("splash", "splash_interpreted"):
        mixed = _splash(query, key, value, interpret=kind != "splash")
    else:
        raise not_one_of("attention", kind, KINDS)
    return checkpoint_name(mixed.reshape(*mixed.shape[:2], -1), SAVED)


def _reference(query, key, value):
    """softmax(q k / sqrt(depth)) v in fp32, as it is written in the books."""
    query, key, wide = (x.astype(jnp.float32) for x in (query, key, value))
    score = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
    share = jax.nn.softmax(score, axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", share, wide).astype(value.dtype)


def _splash(query, key, value, interpret: bool):
    """The Pallas kernel; tokens are padded, and padding is a segment of its own."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    _, tokens, heads, depth = query.shape
    block = splash_block(tokens)
    padded = -(-tokens // block) * block

    def prepared(x):
        x = jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)

    full = splash_attention_mask.FullMask((padded, padded))
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([full] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    segments = None
    if padded != tokens:
        segment = (np.arange(padded) >= tokens).astype(np.int32)
        segments = splash_attention_kernel.SegmentIds(q=segment, kv=segment)
    scaled = (query.astype(jnp.float32) / math.sqrt(depth)).astype(query.dtype)
    mixed = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
        *map(prepared, (scaled, key, value)), segments
    )
    return mixed.swapaxes(1, 2)[:, :tokens]


def splash_block(tokens: int) -> int:
    """Side of the kernel's tiles: little padding first, then large tiles."""
    if tokens <= 4 * LANES:
        return -(-tokens // LANES) * LANES
    blocks = [lanes * LANES for lanes in range(3, 9)]
    return min(blocks, key=lambda block: (-tokens % block, -block))
