"""Prompts as Stable Diffusion 3 sees them: CLIP-L, CLIP-G and T5 together.

Esser et al. 2024, arXiv 2403.03206, section 5.2; joined as in diffusers'
`StableDiffusion3Pipeline.encode_prompt`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import clip_weights, t5
from flowgrpo_jax.models.encoders.clip import CLIPText, CLIPTextConfig
from flowgrpo_jax.models.files import config_json, tensors
from flowgrpo_jax.models.files.tokenizers import Tokenizer
from flowgrpo_jax.models.folder_encoders import (
    CLIP_TOKENS,
    JoinedTokenizer,
    check_length,
)
from flowgrpo_jax.models.sd3 import folder as sd3_folder
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig
from flowgrpo_jax.models.text import TextEmbedding

MAX_SEQUENCE_LENGTH = 256  # T5 tokens; diffusers' default. Flow-GRPO trains with 128.


@dataclasses.dataclass(frozen=True)
class SD3TextConfig:
    """The three encoders; without `t5` its tokens are zeros, as in diffusers."""

    clip_l: CLIPTextConfig
    clip_g: CLIPTextConfig
    t5: t5.T5Config | None
    context_width: int  # joint_attention_dim of the transformer

    @classmethod
    def from_folder(cls, folder: str | Path) -> "SD3TextConfig":
        """From a pipeline's folder; UserError for what is missing or not implemented.

        T5 is left out if model_index.json has no text_encoder_3.
        """
        folder = Path(folder)
        clip_l, clip_g = (
            _clip(folder / name) for name in ("text_encoder", "text_encoder_2")
        )
        large = None
        if sd3_folder.has_t5(folder):
            large = t5.T5Config.from_folder(folder / "text_encoder_3")
        transformer = MMDiTConfig.from_folder(folder / "transformer")
        config = cls(clip_l, clip_g, large, transformer.joint_attention_dim)
        _check_widths(config, transformer.pooled_projection_dim, folder)
        return config

    def with_dtype(self, dtype: DTypeLike) -> "SD3TextConfig":
        """The same encoders computing, and kept, in `dtype`."""
        large = self.t5 and dataclasses.replace(self.t5, dtype=dtype)
        return dataclasses.replace(
            self,
            clip_l=dataclasses.replace(self.clip_l, dtype=dtype),
            clip_g=dataclasses.replace(self.clip_g, dtype=dtype),
            t5=large,
        )

    @property
    def vocabularies(self) -> tuple[int | None, ...]:
        """Ids that each encoder knows."""
        large = self.t5.vocab_size if self.t5 else None
        return self.clip_l.vocab_size, self.clip_g.vocab_size, large


def _clip(folder: Path) -> CLIPTextConfig:
    """One of the two; the pipeline reads it by the class with a projection."""
    values, class_ = config_json.read(folder), "CLIPTextModelWithProjection"
    where = f"model: {folder / 'config.json'}"
    config = CLIPTextConfig.from_dict(values | {"architectures": [class_]}, where)
    if config.projection_dim is None or config.max_position_embeddings < CLIP_TOKENS:
        raise UserError(
            f"{where}: projection_dim must be a number, and max_position_embeddings "
            f"{CLIP_TOKENS} or more"
        )
    return config


def _check_widths(config: SD3TextConfig, pooled: int, folder: Path) -> None:
    """UserError for encoders that do not fit the transformer."""
    clip_l, clip_g = config.clip_l, config.clip_g
    where = f"model: {folder / 'transformer' / 'config.json'}"
    projected = (clip_l.projection_dim or 0) + (clip_g.projection_dim or 0)
    if projected != pooled:
        raise UserError(
            f"{where}: pooled_projection_dim: {pooled}: the two CLIPs give {projected}"
        )
    width = clip_l.hidden_size + clip_g.hidden_size
    if config.t5 is not None and config.t5.d_model != config.context_width:
        width = config.t5.d_model
    elif width <= config.context_width:
        return
    raise UserError(
        f"{where}: joint_attention_dim: {config.context_width}: the text encoders give "
        f"{width}"
    )


def sd3_tokenizer(
    folder: str | Path, max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> JoinedTokenizer:
    """Ids of the three tokenizers side by side: 77 for each CLIP, the rest for T5.

    UserError if `max_sequence_length`, the tokens for T5, is not in 1 ... 512, or if a
    tokenizer is missing.
    """
    check_length(max_sequence_length)
    folder = Path(folder)
    parts = [
        (encoder, Tokenizer(folder / name, "clip", CLIP_TOKENS))
        for encoder, name in (("CLIP-L", "tokenizer"), ("CLIP-G", "tokenizer_2"))
    ]
    if sd3_folder.has_t5(folder):
        large = Tokenizer(folder / "tokenizer_3", "t5", max_sequence_length)
        parts.append(("T5", large))
    return JoinedTokenizer(parts, 2 * CLIP_TOKENS + max_sequence_length)


class SD3Text(nn.Module):
    """Ids of an `sd3_tokenizer` to what the transformer sees.

    Context: CLIP-L and CLIP-G side by side (their last layer but one), padded with
    zeros to the width of T5, then the tokens of T5, which sees its padding as well.
    Pooled: the projected end tokens of both, side by side.
    """

    config: SD3TextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "prompt token"]) -> TextEmbedding:
        cfg = self.config
        ids_l, ids_g, ids_t5 = jnp.split(ids, [CLIP_TOKENS, 2 * CLIP_TOKENS], axis=1)
        states = [
            CLIPText(cfg.clip_l, name="text_encoder")(ids_l),
            CLIPText(cfg.clip_g, name="text_encoder_2")(ids_g),
        ]
        clip = jnp.concatenate([state.penultimate for state in states], axis=-1)
        missing = cfg.context_width - clip.shape[-1]
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, missing)))
        if cfg.t5 is None:
            large = jnp.zeros((*ids_t5.shape, cfg.context_width), clip.dtype)
        else:
            large = t5.T5Encoder(cfg.t5, name="text_encoder_3")(ids_t5)
        return TextEmbedding(
            context=jnp.concatenate([clip, large], axis=1),
            pooled=jnp.concatenate([state.pooled for state in states], axis=-1),
        )


def shapes(config: SD3TextConfig) -> dict[str, Any]:
    """Parameters as `jax.ShapeDtypeStruct`s, by folder, in the type of `config`."""
    ids = jnp.zeros((1, 2 * CLIP_TOKENS + 1), jnp.int32)
    like = jax.eval_shape(SD3Text(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.clip_l.dtype), like
    )


def read(folder: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a pipeline's folder, placed and typed as `like` (`shapes`)."""
    params = {}
    for name, tree in like.items():
        path = Path(folder) / name
        if name == "text_encoder_3":
            table, ignore = t5.TABLE, t5.IGNORE
        else:
            table, ignore = clip_weights.stored_text_table(path), clip_weights.IGNORE
        params[name] = tensors.read(path, table, tree, ignore)
    return params
