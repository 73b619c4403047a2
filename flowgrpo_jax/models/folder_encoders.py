"""Text encoders that lie in a folder of diffusers: in memory only while they encode.

A family says which networks they are and how they are read (`TextNetworks`); tokens,
shapes, files and the life of the weights are the same for all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Int

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files.tokenizers import Tokenizer
from flowgrpo_jax.models.text import Reader, TextEmbedding

CLIP_TOKENS = 77
_LONGEST = 512  # what T5 was trained with, and the most that diffusers allows


@runtime_checkable
class TextConfig(Protocol):
    """Configuration of all text encoders of a family."""

    def with_dtype(self, dtype: Any) -> Any:
        """The same encoders computing, and kept, in `dtype`."""
        ...

    @property
    def vocabularies(self) -> tuple[int | None, ...]:
        """Ids that each encoder knows, in the order of the tokenizers; None for any."""
        ...


class TextNetworks(NamedTuple):
    """How a family's text encoders are read and run.

    `config`: of a folder. `network`: a module from joined ids to a TextEmbedding.
    `shapes`: parameters of a config. `read`: (folder, like) -> parameters. `tokenizer`:
    (folder, T5 tokens) -> a JoinedTokenizer.
    """

    config: Callable[[str], TextConfig]
    network: Callable[[Any], nn.Module]
    shapes: Callable[[Any], Any]
    read: Callable[[str, Any], Any]
    tokenizer: Callable[[str, int], "JoinedTokenizer"]


class JoinedTokenizer:
    """Ids of several tokenizers side by side, [prompt, length]; zeros up to `length`.

    UserError if the tokens for T5 are not in 1 ... 512.
    """

    def __init__(self, parts: Sequence[tuple[str, Tokenizer]], length: int):
        """`parts`: name of the encoder, for messages, and its tokenizer."""
        self._parts, self.length = list(parts), length
        for _, part in self._parts:
            if part.kind == "clip" and part.model_max_length != CLIP_TOKENS:
                raise UserError(
                    f"model: {part.folder}: model_max_length: {part.model_max_length}: "
                    f"only {CLIP_TOKENS} is implemented"
                )

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]:
        ids = np.concatenate([part(prompts) for _, part in self._parts], axis=1)
        return np.pad(ids, ((0, 0), (0, self.length - ids.shape[1])))

    def check(self, vocabularies: Sequence[int | None]) -> None:
        """UserError if a tokenizer has ids that its encoder does not know."""
        for (_, part), known in zip(self._parts, vocabularies, strict=False):
            if known is not None and part.size > known:
                raise UserError(
                    f"model: {part.folder}: {part.size} tokens: its text encoder knows "
                    f"{known} (vocab_size)"
                )

    def readers(self) -> list[Reader]:
        """The encoders and their tokenizers."""
        return [part.reader(name) for name, part in self._parts]


def check_length(max_sequence_length: int) -> None:
    """UserError for a number of T5 tokens that no pipeline takes."""
    if not 1 <= max_sequence_length <= _LONGEST:
        raise UserError(
            f"max_sequence_length: {max_sequence_length}: must be in 1 ... {_LONGEST}"
        )


@dataclasses.dataclass(frozen=True)
class FolderEncoders:
    """See `text.PromptEncoders` for what each method is."""

    folder: str
    max_sequence_length: int  # tokens for T5
    dtype: str  # of their weights and of the embeddings

    @property
    def networks(self) -> TextNetworks:
        """The family's."""
        raise NotImplementedError

    def key(self) -> dict[str, Any]:
        return {"t5_tokens": self.max_sequence_length, "dtype": self.dtype}

    def files(self) -> list[Path]:
        found = [
            path
            for part in ("text_encoder", "tokenizer")
            for path in Path(self.folder).glob(f"{part}*/*")
            if path.is_file()
        ]
        return sorted(found)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        config = self._config()
        network, params = self.networks.network(config), self.networks.shapes(config)
        ids = jax.ShapeDtypeStruct((1, self._tokenizer().length), np.dtype(np.int32))
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
        config, tokenize = self._config(), self._tokenizer()
        tokenize.check(config.vocabularies)
        like = self.networks.shapes(config)
        params = jax.device_put(self.networks.read(self.folder, like))
        run = jax.jit(self.networks.network(config).apply)

        def encode(texts):
            ids = jax.device_put(tokenize(texts))
            return jax.device_get(run({"params": params}, ids))

        return encode

    def readers(self) -> list[Reader]:
        return self._tokenizer().readers()

    def _tokenizer(self) -> JoinedTokenizer:
        return self.networks.tokenizer(self.folder, self.max_sequence_length)

    def _config(self) -> TextConfig:
        return self.networks.config(self.folder).with_dtype(jnp.dtype(self.dtype))
