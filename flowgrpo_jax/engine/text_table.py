"""What a run knows of its prompts: their embeddings, row by row, on the host."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from flowgrpo_jax.data import buckets, embedding_cache
from flowgrpo_jax.data.buckets import Buckets
from flowgrpo_jax.data.embedding_cache import EmbeddingCache, Field
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.text import PromptEncoders, TextEmbedding

# Prompts that are encoded at one time while a run goes on. The encoders are read from
# the disk and dropped again every time (10 GB with T5-XXL, a minute or so), so blocks are
# large; yet not the whole set, of which a short run sees little: in bf16 with 128 T5
# tokens a prompt of a model of that kind takes 1.7 MB, a block 3.4 GB and 50,000 of them 84 GB.
BLOCK = 2048
_TOLD_EVERY = 30.0  # seconds


@runtime_checkable
class TextTable(Protocol):
    """Embeddings of prompts."""

    def lacks(self, texts: Sequence[str]) -> bool:
        """Whether any of these prompts must be added before its row can be asked."""
        ...

    def add(
        self, texts: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> None:
        """Embed those of these prompts that are not there.

        `check` is called now and then and may raise; what was made until then stays.
        """
        ...

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
        self._model, self._negative, self._batch = model, negative, batch
        self._weights = jax.device_put({"text": variables["text"]})
        self._row: dict[str, int] = {}
        self._table: Any = None
        self.add([negative, *texts])

    def lacks(self, texts: Sequence[str]) -> bool:
        return not self._row.keys() >= set(texts)

    def add(
        self, texts: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> None:
        assert self._model.tokenizer is not None
        new = [text for text in dict.fromkeys(texts) if text not in self._row]
        if not new:
            return
        encode, batch = _text_encoder(self._model), self._batch
        ids = self._model.tokenizer(new)
        padded = np.concatenate([ids, np.repeat(ids[:1], -len(ids) % batch, axis=0)])
        made = [
            jax.device_get(encode(self._weights, jax.device_put(padded[i : i + batch])))
            for i in range(0, len(padded), batch)
        ]
        made[-1] = jax.tree.map(
            lambda rows: rows[: batch - len(padded) + len(new)], made[-1]
        )
        parts = made if self._table is None else [self._table, *made]
        self._table = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        held = len(self._row)
        self._row |= {text: held + number for number, text in enumerate(new)}

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
        self._encoders, self._negative, self._batch = encoders, negative, batch
        self.add([negative, *texts])

    def lacks(self, texts: Sequence[str]) -> bool:
        return bool(self._cache.missing(texts))

    def add(
        self, texts: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> None:
        if not self._cache.missing(texts):
            return
        with self._cache.exclusively(), jax.transfer_guard("allow"):
            left = self._cache.missing(texts)  # another run may have made some
            if not left:
                return
            size = len(left) * self._cache.record_bytes / 1e9
            print(
                f"encoding {len(left)} prompts into {self._cache.path} ({size:.2f} GB)",
                flush=True,
            )
            encode = self._encoders.encoding()
            tell = _teller(len(left))
            for start in range(0, len(left), self._batch):
                check()
                part = left[start : start + self._batch]
                made = encode(part + [""] * (self._batch - len(part)))
                self._cache.add(part, vars(made))
                tell(start + len(part))

    def rows(self, texts: list[str]) -> TextEmbedding:
        return TextEmbedding(**self._cache.rows(texts))

    @property
    def empty(self) -> TextEmbedding:
        return self.rows([self._negative])


def _teller(total: int) -> Callable[[int], None]:
    """Tells, now and then, how many of the prompts are done, and the time to go."""
    begin = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done < total and now - told >= _TOLD_EVERY:
            told = now
            minutes = (now - begin) / done * (total - done) / 60
            print(f"encoded {done} of {total}, {minutes:.0f} min to go", flush=True)

    return tell


def coming(
    prompts: Buckets, seed: int, iteration: int, size: int, last: int
) -> list[str]:
    """The prompts of the iterations from `iteration` on, at least `BLOCK` of them.

    `size` prompts an iteration, and none of `last` and later ones.
    """
    stop = min(iteration + -(-BLOCK // size), last)
    return [
        prompt.text
        for number in range(iteration, stop)
        for prompt in buckets.batch(prompts, seed, number, size)[1]
    ]
