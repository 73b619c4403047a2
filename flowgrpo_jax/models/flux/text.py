"""Prompts as FLUX.1 sees them: T5's tokens, and one vector of CLIP-L.

As in diffusers' `FluxPipeline.encode_prompt`: T5 sees its padding, and the transformer
sees all tokens of T5.
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
from flowgrpo_jax.models.flux.transformer_config import FluxConfig
from flowgrpo_jax.models.folder_encoders import (
    CLIP_TOKENS,
    JoinedTokenizer,
    check_length,
)
from flowgrpo_jax.models.text import TextEmbedding


@dataclasses.dataclass(frozen=True)
class FluxTextConfig:
    """CLIP-L without its projection, and T5."""

    clip: CLIPTextConfig
    t5: t5.T5Config

    @classmethod
    def from_folder(cls, folder: str | Path) -> "FluxTextConfig":
        """From a pipeline's folder; UserError for what does not fit the transformer."""
        folder = Path(folder)
        path = folder / "text_encoder"
        values, where = config_json.read(path), f"model: {path / 'config.json'}"
        # The pipeline reads it by this class, which has no projection.
        clip = CLIPTextConfig.from_dict(
            values | {"architectures": ["CLIPTextModel"]}, where
        )
        large = t5.T5Config.from_folder(folder / "text_encoder_2")
        transformer = FluxConfig.from_folder(folder / "transformer")
        where = f"model: {folder / 'transformer' / 'config.json'}"
        for key, found in (
            ("pooled_projection_dim", clip.hidden_size),
            ("joint_attention_dim", large.d_model),
        ):
            if getattr(transformer, key) != found:
                raise UserError(
                    f"{where}: {key}: {getattr(transformer, key)}: the text encoders "
                    f"give {found}"
                )
        return cls(clip, large)

    def with_dtype(self, dtype: DTypeLike) -> "FluxTextConfig":
        """The same encoders computing, and kept, in `dtype`."""
        return FluxTextConfig(
            dataclasses.replace(self.clip, dtype=dtype),
            dataclasses.replace(self.t5, dtype=dtype),
        )

    @property
    def vocabularies(self) -> tuple[int | None, ...]:
        """Ids that each encoder knows."""
        return self.clip.vocab_size, self.t5.vocab_size


class FluxText(nn.Module):
    """Ids of CLIP (77) and T5 side by side to what the transformer sees."""

    config: FluxTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "prompt token"]) -> TextEmbedding:
        cfg = self.config
        ids_clip, ids_t5 = jnp.split(ids, [CLIP_TOKENS], axis=1)
        states = CLIPText(cfg.clip, name="text_encoder")(ids_clip)
        context = t5.T5Encoder(cfg.t5, name="text_encoder_2")(ids_t5)
        return TextEmbedding(context=context, pooled=states.pooled)


def shapes(config: FluxTextConfig) -> dict[str, Any]:
    """Parameters as `jax.ShapeDtypeStruct`s, by folder, in the type of `config`."""
    ids = jnp.zeros((1, CLIP_TOKENS + 1), jnp.int32)
    like = jax.eval_shape(FluxText(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.clip.dtype), like
    )


def read(folder: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a pipeline's folder, placed and typed as `like` (`shapes`)."""
    clip, large = Path(folder) / "text_encoder", Path(folder) / "text_encoder_2"
    table = clip_weights.stored_text_table(clip)
    return {
        "text_encoder": tensors.read(
            clip, table, like["text_encoder"], clip_weights.IGNORE
        ),
        "text_encoder_2": tensors.read(
            large, t5.TABLE, like["text_encoder_2"], t5.IGNORE
        ),
    }


def flux_tokenizer(folder: str | Path, max_sequence_length: int) -> JoinedTokenizer:
    """Ids of both tokenizers side by side: 77 for CLIP, the rest for T5.

    UserError if `max_sequence_length`, the tokens for T5, is not in 1 ... 512, or if a
    tokenizer is missing.
    """
    check_length(max_sequence_length)
    folder = Path(folder)
    parts = [
        ("CLIP-L", Tokenizer(folder / "tokenizer", "clip", CLIP_TOKENS)),
        ("T5", Tokenizer(folder / "tokenizer_2", "t5", max_sequence_length)),
    ]
    return JoinedTokenizer(parts, CLIP_TOKENS + max_sequence_length)
