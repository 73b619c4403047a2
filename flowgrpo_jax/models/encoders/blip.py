"""BLIP's image-grounded text encoder (Li et al. 2022, arXiv 2201.12086).

A vision transformer sees the image; a BERT reads the text and, in every layer, attends
to the image's tokens. Names of tensors are those of Salesforce's checkpoints, which
ImageReward kept.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flowgrpo_jax.models.encoders import clip
from flowgrpo_jax.models.encoders.clip import CLIPVisionConfig
from flowgrpo_jax.models.encoders.clip_weights import affine
from flowgrpo_jax.models.files.tensors import Rule

# The large vision transformer, at ImageReward's resolution.
VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    projection_dim=None,
)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Fields of med_config.json, and the vision transformer; defaults of ImageReward."""

    vocab_size: int = 30524  # BERT's and two more
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    vision: CLIPVisionConfig = VISION
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream


class Blip(nn.Module):
    """States of the text's tokens, grounded in its image."""

    config: BlipConfig

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "image height width channel"],
        ids: Int[Array, "image token"],
        mask: Bool[Array, "image token"],
    ) -> Float[Array, "image token feature"]:
        """`mask` is true for the tokens of the text, false for padding."""
        cfg = self.config
        vision = dataclasses.replace(cfg.vision, dtype=cfg.dtype)
        image = BlipVision(vision, name="vision")(pixels)
        words = nn.Embed(
            cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, name="word_embeddings"
        )
        places = nn.Embed(
            cfg.max_position_embeddings,
            cfg.hidden_size,
            dtype=cfg.dtype,
            name="position_embeddings",
        )
        states = words(ids) + places(jnp.arange(ids.shape[1]))
        states = _norm(cfg, "norm")(states)
        stack = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_hidden_layers,
        )
        return stack(cfg, name="layers")(states, mask[:, None, None], image)[0]


class BlipVision(nn.Module):
    """All tokens of the image, after the final norm."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "image height width channel"]
    ) -> Float[Array, "image token feature"]:
        tokens = clip.image_tokens(self, self.config, pixels, timm=True)
        last, _ = clip.layers(self.config, causal=False)(tokens)
        return clip.norm(self.config, "norm")(last)


class _Layer(nn.Module):
    """BERT's layer: norms after each sum; the second attention looks at the image."""

    config: BlipConfig

    @nn.compact
    def __call__(self, states, mask, image):
        cfg = self.config
        mixed = self._attend("self", states, states, mask)
        states = _norm(cfg, "self_norm")(states + mixed)
        mixed = self._attend("cross", states, image, None)
        states = _norm(cfg, "cross_norm")(states + mixed)
        hidden = jax.nn.gelu(
            self._dense(cfg.intermediate_size, "fc1")(states), approximate=False
        )
        hidden = self._dense(cfg.hidden_size, "fc2")(hidden)
        return _norm(cfg, "norm")(states + hidden), None

    def _attend(self, name: str, states, seen, mask):
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def project(part: str, tokens):
            flat = self._dense(width, f"{name}_{part}")(tokens)
            return flat.reshape(*flat.shape[:2], heads, -1)

        # Softmax in fp32 whatever the dtype.
        mixed = jax.nn.dot_product_attention(
            project("query", states),
            project("key", seen),
            project("value", seen),
            mask=mask,
        )
        return self._dense(width, f"{name}_out")(mixed.reshape(states.shape))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.config.dtype, name=name)


def _norm(cfg: BlipConfig, name: str) -> nn.LayerNorm:
    """Statistics in fp32 (flax's default), as a mean of squared differences."""
    return nn.LayerNorm(
        cfg.layer_norm_eps, dtype=cfg.dtype, use_fast_variance=False, name=name
    )


def shapes(config: BlipConfig) -> dict:
    """Parameters as shapes, in the type that the network computes in."""
    side, ids = config.vision.image_size, jnp.zeros((1, 2), jnp.int32)
    pixels = jnp.zeros((1, side, side, config.vision.num_channels))
    mask = jnp.ones((1, 2), bool)
    like = jax.eval_shape(Blip(config).init, jax.random.key(0), pixels, ids, mask)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), like["params"]
    )


def table(theirs: str = "", ours: str = "") -> list[Rule]:
    """The rename table, under a prefix of the file and of ours."""
    text, image = f"{theirs}text_encoder.", f"{theirs}visual_encoder."
    layer, block = f"{text}encoder.layer.{{layer}}.", f"{image}blocks.{{layer}}."
    rows = f"{ours}layers"
    rules = []
    for name, attention in (("self", "attention"), ("cross", "crossattention")):
        rules += affine(
            f"{rows}/{name}_(query|key|value)", rf"{layer}{attention}.self.\1"
        )
        rules += affine(f"{rows}/{name}_out", f"{layer}{attention}.output.dense")
        rules += affine(
            f"{rows}/{name}_norm", f"{layer}{attention}.output.LayerNorm", "same"
        )
    words = f"{text}embeddings."
    return [
        *rules,
        *affine(f"{rows}/fc1", f"{layer}intermediate.dense"),
        *affine(f"{rows}/fc2", f"{layer}output.dense"),
        *affine(f"{rows}/norm", f"{layer}output.LayerNorm", "same"),
        Rule(f"{ours}(\\w+_embeddings)/embedding", rf"{words}\1.weight"),
        *affine(f"{ours}norm", f"{words}LayerNorm", "same"),
        *_vision_table(image, f"{ours}vision/", block),
    ]


def _vision_table(theirs: str, ours: str, block: str) -> list[Rule]:
    """The vision transformer, in timm's names."""
    return [
        Rule(f"{ours}class_embedding", f"{theirs}cls_token"),
        Rule(f"{ours}position_embedding", f"{theirs}pos_embed"),
        *affine(f"{ours}patch_embedding", f"{theirs}patch_embed.proj", "conv"),
        *affine(f"{ours}layers/layer_(norm[12])", rf"{block}\1", "same"),
        *affine(f"{ours}layers/qkv", f"{block}attn.qkv"),
        *affine(f"{ours}layers/out", f"{block}attn.proj"),
        *affine(f"{ours}layers/(fc[12])", rf"{block}mlp.\1"),
        *affine(f"{ours}norm", f"{theirs}norm", "same"),
    ]
