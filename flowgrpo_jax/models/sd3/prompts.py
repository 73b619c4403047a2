"""From prompts to embeddings by the three text encoders of a folder."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.text import TextEmbedding


@dataclasses.dataclass(frozen=True)
class SD3PromptEncoders:
    """The text encoders of a folder; they are in memory only while `encoding`."""

    folder: str
    max_sequence_length: int  # tokens for T5
    dtype: str  # of their weights and of the embeddings

    def key(self) -> dict[str, Any]:
        """What determines an embedding, beside the prompt and the `files`."""
        return {"t5_tokens": self.max_sequence_length, "dtype": self.dtype}

    def files(self) -> list[Path]:
        """Weights and configurations of encoders and tokenizers."""
        found = [
            path
            for part in ("text_encoder", "tokenizer")
            for path in Path(self.folder).glob(f"{part}*/*")
            if path.is_file()
        ]
        return sorted(found)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of the parts of an embedding, without the prompt axis."""
        config = self._config()
        tokens = 2 * sd3_text.CLIP_TOKENS + self.max_sequence_length
        network, params = sd3_text.SD3Text(config), sd3_text.shapes(config)
        ids = jax.ShapeDtypeStruct((1, tokens), np.dtype(np.int32))
        found = jax.eval_shape(
            lambda params, ids: vars(network.apply({"params": params}, ids)),
            params,
            ids,
        )
        return {
            name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for name, leaf in found.items()
        }

    def encoding(self) -> Callable[[Sequence[str]], TextEmbedding]:
        """Loads the encoders; what it returns embeds prompts and holds them."""
        config = self._config()
        tokenize = self._tokenizer()
        tokenize.check(config)
        like = sd3_text.shapes(config)
        params = jax.device_put(sd3_text.read(self.folder, like))
        run = jax.jit(sd3_text.SD3Text(config).apply)

        def encode(texts):
            ids = jax.device_put(tokenize(texts))
            return jax.device_get(run({"params": params}, ids))

        return encode

    def cut(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The texts of which an encoder does not see the end, by that encoder."""
        return self._tokenizer().cut(texts)

    def _tokenizer(self) -> sd3_text.SD3Tokenizer:
        return _tokenizer(self.folder, self.max_sequence_length)

    def _config(self) -> sd3_text.SD3TextConfig:
        config = sd3_text.SD3TextConfig.from_folder(self.folder)
        return config.with_dtype(jnp.dtype(self.dtype))


@functools.lru_cache(1)
def _tokenizer(folder: str, max_sequence_length: int) -> sd3_text.SD3Tokenizer:
    return sd3_text.SD3Tokenizer(folder, max_sequence_length)
