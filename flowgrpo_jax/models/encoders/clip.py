"""CLIP (Radford et al. 2021): the text tower, the image tower, and both as one model.

One class per tower serves CLIP-L, CLIP-G, CLIP-H and any other size, by the config.json
of transformers; `clip_weights.py` reads weights, of transformers' and of
open_clip's layout. Layers are scanned; norm statistics and softmax are fp32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
SUPPORTED: dict[str, tuple] = {"hidden_act": tuple(ACTIVATIONS)}
_OF_BOTH = (  # keys of a CLIPModel; the scale of the logits stands among the weights
    *config_json.BOOKKEEPING,
    *("text_config", "text_config_dict", "vision_config", "vision_config_dict"),
    *("projection_dim", "logit_scale_init_value"),
)
# Files from before transformers 4.31 carry this end token, which no text contains.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What both towers have: fields of transformers' config.json, and our dtype."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512  # None: the tower has no projection
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """Fields of a CLIPTextModel's config.json; defaults are those of transformers."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "model: CLIP's text config"
    ) -> "CLIPTextConfig":
        """From config.json; it has a projection if its class in transformers has one."""
        kinds = {"model_type": ("clip_text_model", "clip")}
        config = config_json.build(cls, values, SUPPORTED | kinds, where)
        _check_heads(config, where)
        classes = values.get("architectures")
        if isinstance(classes, list) and "CLIPTextModelWithProjection" in classes:
            return config
        return dataclasses.replace(config, projection_dim=None)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPTextConfig":
        """From a text_encoder folder of a diffusers pipeline."""
        return cls.from_dict(config_json.read(folder), _where(folder))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """Fields of a CLIPVisionModel's config.json; defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels along one side
    patch_size: int = 32

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "model: CLIP's vision config"
    ) -> "CLIPVisionConfig":
        """From the config.json of a CLIPVisionModelWithProjection."""
        kinds = {"model_type": ("clip_vision_model", "clip")}
        config = config_json.build(cls, values, SUPPORTED | kinds, where)
        _check_heads(config, where)
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPVisionConfig":
        """From the folder of a CLIPVisionModelWithProjection."""
        return cls.from_dict(config_json.read(folder), _where(folder))


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A text and an image tower that project into one space."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "model: CLIP's config"
    ) -> "CLIPConfig":
        """From a CLIPModel's config.json."""
        config_json.check_known(values, {"model_type": ("clip",)}, _OF_BOTH, where)
        tower = _tower(values, "text_config", where)
        text = CLIPTextConfig.from_dict(tower, f"{where}: text_config")
        tower = _tower(values, "vision_config", where)
        vision = CLIPVisionConfig.from_dict(tower, f"{where}: vision_config")
        shared = {"projection_dim": values.get("projection_dim", 512)}
        return cls(
            dataclasses.replace(text, **shared), dataclasses.replace(vision, **shared)
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPConfig":
        """From the folder of a CLIPModel."""
        return cls.from_dict(config_json.read(folder), _where(folder))

    def with_dtype(self, dtype: DTypeLike) -> "CLIPConfig":
        """The same towers computing in `dtype`."""
        return CLIPConfig(
            dataclasses.replace(self.text, dtype=dtype),
            dataclasses.replace(self.vision, dtype=dtype),
        )


def _tower(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """Old files say it twice; transformers lets the second, `..._dict`, win."""
    second = values.get(f"{name}_dict")
    found = (values.get(name) or {}) if second is None else second
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: {name}: must be an object")
    return found


def _check_heads(config: TowerConfig, where: str) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size: {config.hidden_size}: must be a multiple of "
            f"num_attention_heads, {config.num_attention_heads}"
        )


def _where(folder: str | Path) -> str:
    return f"model: {Path(folder) / 'config.json'}"


@struct.dataclass
class TextStates:
    """What the text tower makes of token ids."""

    last: Float[Array, "prompt token width"]  # after the final norm
    penultimate: Float[Array, "prompt token width"]  # output of the last layer but one
    pooled: Float[Array, "prompt pooled"]  # `last` at the end token, projected


@struct.dataclass
class ImageStates:
    """What the image tower makes of normalised pixels; token 0 is the class token."""

    last: Float[Array, "image token width"]  # output of the last layer
    penultimate: Float[Array, "image token width"]  # output of the last layer but one
    pooled: Float[Array, "image width"]  # class token after the final norm
    projected: Float[Array, "image projection"]  # `pooled` if there is no projection


class CLIPText(nn.Module):
    """Causal transformer over token ids, read out at the end token."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "prompt token"]) -> TextStates:
        cfg = self.config
        length = ids.shape[1]
        if length > cfg.max_position_embeddings:
            raise UserError(
                f"text of {length} tokens: the encoder takes at most "
                f"{cfg.max_position_embeddings}"
            )
        words = nn.Embed(
            cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, name="token_embedding"
        )
        place = _positions(self, cfg, cfg.max_position_embeddings)[:length]
        last, penultimate = layers(cfg, causal=True)(words(ids) + place)
        last = norm(cfg, "final_layer_norm")(last)
        pooled = last[jnp.arange(len(ids)), end_position(ids, cfg.eos_token_id)]
        if cfg.projection_dim is not None:
            pooled = _projection(cfg, "text_projection")(pooled)
        return TextStates(last, penultimate, pooled)


class CLIPVision(nn.Module):
    """Transformer over the patches of a normalised image, and a class token."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "image height width channel"]
    ) -> ImageStates:
        cfg = self.config
        tokens = image_tokens(self, cfg, pixels)
        tokens = norm(cfg, "pre_layernorm")(tokens)
        last, penultimate = layers(cfg, causal=False)(tokens)
        pooled = projected = norm(cfg, "post_layernorm")(last[:, 0])
        if cfg.projection_dim is not None:
            projected = _projection(cfg, "visual_projection")(pooled)
        return ImageStates(last, penultimate, pooled, projected)


class CLIP(nn.Module):
    """Both towers and the learned scale of their similarity."""

    config: CLIPConfig

    def setup(self):
        self.text = CLIPText(self.config.text)
        self.vision = CLIPVision(self.config.vision)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(2.6592), ()
        )

    def embed_text(self, ids: Int[Array, "prompt token"]) -> Float[Array, "prompt _"]:
        """Unit vectors, fp32."""
        return normalise(self.text(ids).pooled)

    def embed_images(
        self, pixels: Float[Array, "image height width channel"]
    ) -> Float[Array, "image _"]:
        """Unit vectors of normalised pixels, fp32."""
        return normalise(self.vision(pixels).projected)

    def __call__(
        self,
        pixels: Float[Array, "image height width channel"],
        ids: Int[Array, "image token"],
    ) -> Float[Array, " image"]:
        """exp(logit_scale) * cosine of every image with the prompt of its own."""
        cosine = (self.embed_images(pixels) * self.embed_text(ids)).sum(axis=-1)
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * cosine


def normalise(
    vectors: Float[Array, "*batch feature"],
) -> Float[Array, "*batch feature"]:
    """Vectors of length one, fp32."""
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def end_position(ids: Int[Array, "prompt token"], eos: int) -> Int[Array, " prompt"]:
    """Where each text ends: its first `eos`; the largest id for a legacy `eos` of 2."""
    return (ids if eos == LEGACY_EOS else ids == eos).argmax(axis=-1)


def image_tokens(
    module: nn.Module,
    cfg: CLIPVisionConfig,
    pixels: Float[Array, "image height width channel"],
    timm: bool = False,
) -> Float[Array, "image token feature"]:
    """A class token and the patches, with their positions; parameters of `module`.

    As `timm` keeps them, patches have a bias, and token and positions leading ones.
    """
    side, width = cfg.patch_size, cfg.hidden_size
    if pixels.shape[1:3] != (cfg.image_size, cfg.image_size):
        raise ValueError(
            f"images of {pixels.shape[1:3]}, the tower takes {cfg.image_size}"
        )
    patches = nn.Conv(
        width,
        kernel_size=(side, side),
        strides=side,
        padding="VALID",
        use_bias=timm,
        dtype=cfg.dtype,
        name="patch_embedding",
    )(pixels)
    patches = patches.reshape(len(pixels), -1, width)
    shape = (1, 1, width) if timm else (width,)
    token = module.param("class_embedding", nn.initializers.normal(0.02), shape)
    token = jnp.broadcast_to(token.astype(cfg.dtype), (len(pixels), 1, width))
    tokens = jnp.concatenate([token, patches], axis=1)
    lead = (1,) if timm else ()
    return tokens + _positions(module, cfg, *lead, tokens.shape[1])


def layers(cfg: TowerConfig, causal: bool) -> Callable:
    """Tokens -> (output of the last layer, of the one before it)."""
    stack = nn.scan(
        _Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=cfg.num_hidden_layers,
    )(cfg, causal, name="layers")
    return lambda tokens: stack((tokens, tokens))[0]


class _Layer(nn.Module):
    """Attention and MLP, each on normed tokens; carries what it was given along."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, carry, _=None):
        cfg = self.config
        tokens, _ = carry
        normed = norm(cfg, "layer_norm1")(tokens)
        fused = nn.Dense(3 * cfg.hidden_size, dtype=cfg.dtype, name="qkv")(normed)
        heads = (*tokens.shape[:2], 3, cfg.num_attention_heads, -1)
        query, key, value = jnp.moveaxis(fused.reshape(heads), 2, 0)
        # Softmax in fp32 whatever the dtype.
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        mixed = mixed.reshape(tokens.shape)
        out = tokens + nn.Dense(cfg.hidden_size, dtype=cfg.dtype, name="out")(mixed)
        hidden = nn.Dense(cfg.intermediate_size, dtype=cfg.dtype, name="fc1")(
            norm(cfg, "layer_norm2")(out)
        )
        hidden = ACTIVATIONS[cfg.hidden_act](hidden)
        out = out + nn.Dense(cfg.hidden_size, dtype=cfg.dtype, name="fc2")(hidden)
        return (out, tokens), None


def norm(cfg: TowerConfig, name: str) -> nn.LayerNorm:
    """Statistics in fp32 (flax's default), as a mean of squared differences."""
    return nn.LayerNorm(
        cfg.layer_norm_eps, dtype=cfg.dtype, use_fast_variance=False, name=name
    )


def _projection(cfg: TowerConfig, name: str) -> nn.Dense:
    assert cfg.projection_dim is not None
    return nn.Dense(cfg.projection_dim, use_bias=False, dtype=cfg.dtype, name=name)


def _positions(module: nn.Module, cfg: TowerConfig, *shape: int):
    table = module.param(
        "position_embedding", nn.initializers.normal(0.02), (*shape, cfg.hidden_size)
    )
    return table.astype(cfg.dtype)
