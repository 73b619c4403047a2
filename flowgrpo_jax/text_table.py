"""What a run knows of its prompts: their embeddings, row by row, on the host."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from flowgrpo_jax.data import embedding_cache
from flowgrpo_jax.data.embedding_cache import EmbeddingCache, Field
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.sd3 import PromptEncoders
from flowgrpo_jax.models.text import TextEmbedding


@runtime_checkable
class TextTable(Protocol):
    """Embeddings of the prompts that it was made for."""

    def rows(self, texts: list[str]) -> TextEmbedding:
        """Embeddings of these prompts, in order."""
        ...

    @property
    def empty(self) -> TextEmbedding:
        """The one row of the negative prompt, which guidance leads away from."""
        ...


def make(
    model: FlowModel,
    variables: Variables,
    texts: Sequence[str],
    cache: str = "",
    negative: str = "",
) -> TextTable:
    """The table of these prompts and the negative one.

    Encoders that train beside the transformer are in `variables`; others read and fill
    the cache on disk in the folder `cache`.
    """
    if model.prompts is None:
        return WordTable(model, variables, texts, negative)
    return CachedTable(model.prompts, cache, texts, negative)


@functools.cache
def _text_encoder(model: FlowModel) -> Callable:
    return jax.jit(model.encode_text)


class WordTable:
    """A table in memory, of the embedded model."""

    def __init__(
        self,
        model: FlowModel,
        variables: Variables,
        texts: Sequence[str],
        negative: str = "",
        batch: int = 64,
    ):
        assert model.tokenizer is not None
        self._negative = negative
        self._row = {
            text: i for i, text in enumerate(dict.fromkeys([negative, *texts]))
        }
        encode = _text_encoder(model)
        weights = jax.device_put({"text": variables["text"]})
        ids = model.tokenizer(list(self._row))
        padded = np.concatenate([ids, np.repeat(ids[:1], -len(ids) % batch, axis=0)])
        parts = [
            jax.device_get(encode(weights, jax.device_put(padded[i : i + batch])))
            for i in range(0, len(padded), batch)
        ]
        self._table: Any = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def rows(self, texts: list[str]) -> TextEmbedding:
        index = np.array([self._row[text] for text in texts])
        return jax.tree.map(lambda rows: rows[index], self._table)

    @property
    def empty(self) -> TextEmbedding:
        return self.rows([self._negative])


class CachedTable:
    """A table on disk; the encoders are loaded only if it lacks a prompt."""

    def __init__(
        self,
        encoders: PromptEncoders,
        folder: str,
        texts: Sequence[str],
        negative: str = "",
        batch: int = 8,
    ):
        fields = {
            name: Field(shape.shape, np.dtype(shape.dtype))
            for name, shape in encoders.shapes().items()
        }
        files = embedding_cache.fingerprint(encoders.files(), folder)
        self._cache = EmbeddingCache(folder, encoders.key() | {"files": files}, fields)
        self._negative = negative
        self._fill(encoders, [negative, *texts], batch)

    def _fill(self, encoders: PromptEncoders, texts: list[str], batch: int) -> None:
        if not self._cache.missing(texts):
            return
        with self._cache.writing():
            left = self._cache.missing(texts)  # another run may have made some
            if not left:
                return
            size = len(left) * self._cache.record_bytes / 1e9
            print(
                f"encoding {len(left)} prompts into {self._cache.path} ({size:.2f} GB)"
            )
            encode = encoders.encoding()
            for start in range(0, len(left), batch):
                part = left[start : start + batch]
                made = encode(part + [""] * (batch - len(part)))
                self._cache.add(part, vars(made))

    def rows(self, texts: list[str]) -> TextEmbedding:
        return TextEmbedding(**self._cache.rows(texts))

    @property
    def empty(self) -> TextEmbedding:
        return self.rows([self._negative])
