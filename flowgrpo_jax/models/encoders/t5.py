"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683), version 1.1 included.

No biases, no scale on the scores: positions are a learned bias on them, one number per
head and bucket of distances, that all layers share.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.tensors import Rule, Table
from flowgrpo_jax.models.layers import RMSNorm

_HARMLESS = (  # the last three are of the decoder, or of a length that no table has
    *config_json.BOOKKEEPING,
    *("eos_token_id", "num_decoder_layers", "scale_decoder_outputs", "n_positions"),
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Fields of transformers' T5 config.json with the defaults of its class."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of a head; heads need not add up to d_model
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "relu"
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], where: str = "model: T5's config.json"
    ) -> "T5Config":
        """From the keys of config.json; UserError for what is not implemented."""
        gated = values.get("feed_forward_proj") == "gated-gelu"
        supported = {
            "model_type": ("t5",),
            "feed_forward_proj": ("relu", "gated-gelu"),
            "layer_norm_epsilon": (1e-6,),
            # Written beside feed_forward_proj, and believed where they differ from it.
            "dense_act_fn": ("gelu_new",) if gated else ("relu",),
            "is_gated_act": (gated,),
        }
        config = config_json.build(cls, values, supported, where, _HARMLESS)
        exact = config.relative_attention_num_buckets // 4
        if exact < 1 or config.relative_attention_max_distance <= exact:
            raise UserError(
                f"{where}: relative_attention_num_buckets: must be at least 4, and "
                "relative_attention_max_distance above a quarter of it"
            )
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Config":
        """From the text_encoder_3 folder of a diffusers pipeline."""
        values = config_json.read(folder)
        return cls.from_dict(values, f"model: {Path(folder) / 'config.json'}")


# The encoder of T5 v1.1 XXL, text_encoder_3 of Stable Diffusion 3: 4.76 billion.
XXL = T5Config(
    d_model=4096,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)


class T5Encoder(nn.Module):
    """States of the last layer, normalised, in the config's dtype."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "prompt token"],
        mask: Bool[Array, "prompt token"] | None = None,
    ) -> Float[Array, "prompt token d_model"]:
        """`mask` is true for the tokens that may be looked at; without it all may."""
        cfg = self.config
        hidden = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, name="shared")(
            ids
        )
        bias = nn.Embed(
            cfg.relative_attention_num_buckets,
            cfg.num_heads,
            dtype=jnp.float32,
            name="relative_attention_bias",
        )(position_buckets(cfg, ids.shape[1]))
        bias = bias.transpose(2, 0, 1)[None]  # one prompt, head, query, key
        if mask is not None:
            mask = mask[:, None, None]
        stack = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )
        hidden, _ = stack(cfg, name="blocks")(hidden, bias, mask)
        return RMSNorm(name="final_layer_norm")(hidden)


class _Block(nn.Module):
    """Attention and feed-forward on normalised states, in the form of `nn.scan`."""

    config: T5Config

    @nn.compact
    def __call__(self, hidden, bias, mask):
        normed = RMSNorm(name="attention_norm")(hidden)
        hidden = hidden + self._attention(normed, bias, mask)
        normed = RMSNorm(name="feed_forward_norm")(hidden)
        return hidden + self._feed_forward(normed), None

    def _attention(self, hidden, bias, mask):
        cfg = self.config
        prompts, tokens, _ = hidden.shape
        heads = (prompts, tokens, cfg.num_heads, cfg.d_kv)
        inner = cfg.num_heads * cfg.d_kv
        query, key, value = (
            self._dense(inner, name)(hidden).reshape(heads) for name in ("q", "k", "v")
        )
        # Scores, bias and softmax in fp32.
        mixed = jax.nn.dot_product_attention(
            query, key, value, bias=bias, mask=mask, scale=1.0, implementation="xla"
        )
        return self._dense(cfg.d_model, "o")(mixed.reshape(prompts, tokens, inner))

    def _feed_forward(self, hidden):
        cfg = self.config
        if cfg.feed_forward_proj == "relu":
            inner = nn.relu(self._dense(cfg.d_ff, "wi")(hidden))
        else:
            gate = self._dense(cfg.d_ff, "wi_0")(hidden)
            inner = nn.gelu(gate, approximate=True)
            inner = inner * self._dense(cfg.d_ff, "wi_1")(hidden)
        return self._dense(cfg.d_model, "wo")(inner)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, use_bias=False, dtype=self.config.dtype, name=name)


def position_buckets(config: T5Config, tokens: int) -> Int[np.ndarray, "query key"]:
    """Bucket of the distance from every query to every key.

    Half of the buckets are for keys after the query. Of each half, half are distances of
    their own and half grow with the logarithm up to the largest distance.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    size = np.abs(distance)
    # In fp32, as the weights were trained: a boundary rounds the same way.
    growth = np.log(np.maximum(size, 1).astype(np.float32) / exact)
    span = np.float32(np.log(config.relative_attention_max_distance / exact))
    far = exact + (growth / span * (half - exact)).astype(np.int32)
    bucket = np.where(size < exact, size, np.minimum(far, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


_BLOCK = "encoder.block.{layer}.layer"
TABLE: Table = (
    Rule("shared/embedding", "shared.weight"),
    Rule(
        "relative_attention_bias/embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    Rule("blocks/attention_norm/scale", f"{_BLOCK}.0.layer_norm.weight"),
    Rule("blocks/([qkvo])/kernel", rf"{_BLOCK}.0.SelfAttention.\1.weight", "dense"),
    Rule("blocks/feed_forward_norm/scale", f"{_BLOCK}.1.layer_norm.weight"),
    Rule(r"blocks/(w\w+)/kernel", rf"{_BLOCK}.1.DenseReluDense.\1.weight", "dense"),
    Rule("final_layer_norm/scale", "encoder.final_layer_norm.weight"),
)
# The embedding under its second name, and the decoder of a whole T5.
IGNORE: tuple[str, ...] = (
    r"(en|de)coder\.embed_tokens\.weight",
    r"decoder\..*",
    r"lm_head\.weight",
)
