"""Text encoders. The embedded model reads words; SD3's CLIP and T5 stand beside it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

_Arrays = Array | np.ndarray | jax.ShapeDtypeStruct  # of device, host, or planned
PAD, UNKNOWN = 0, 1
# "a photo of a red circle" and "red circle" are the same picture.
STOP_WORDS = frozenset({"a", "an", "the", "photo", "of"})


@struct.dataclass
class TextEmbedding:
    """What the transformer sees of the prompts: token states and one pooled vector."""

    context: Float[_Arrays, "*lead token feature"]
    pooled: Float[_Arrays, "*lead pooled"]


@runtime_checkable
class Tokenizer(Protocol):
    """Prompts to ids below `size`, `max_length` of them each."""

    @property
    def size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]: ...


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Words to ids: 0 pads, 1 stands for every unknown word."""

    words: tuple[str, ...]
    max_length: int = 8

    @property
    def size(self) -> int:
        return len(self.words) + 2

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]:
        """Token ids [prompt, max_length]; longer prompts are cut."""
        index = {word: i + 2 for i, word in enumerate(self.words)}
        ids = np.full((len(prompts), self.max_length), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            words = re.findall(r"\w+", prompt.lower())
            words = [w for w in words if w not in STOP_WORDS][: self.max_length]
            row[: len(words)] = [index.get(word, UNKNOWN) for word in words]
        return ids


@dataclasses.dataclass(frozen=True)
class LetterTokenizer:
    """Letters of the text in double quotes to ids; the rest of a prompt says nothing."""

    letters: str
    max_length: int = 8

    @property
    def size(self) -> int:
        return len(self.letters) + 2

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]:
        """Token ids [prompt, max_length]; longer texts are cut."""
        ids = np.full((len(prompts), self.max_length), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            quoted = prompt.partition('"')[2].partition('"')[0]
            text = quoted.upper()[: self.max_length]
            row[: len(text)] = [_letter_id(self.letters, letter) for letter in text]
        return ids


def _letter_id(letters: str, letter: str) -> int:
    return letters.index(letter) + 2 if letter in letters else UNKNOWN


class WordEncoder(nn.Module):
    """Word embeddings with position; the pooled vector sees all words in order."""

    vocabulary: int
    width: int
    max_length: int

    @nn.compact
    def __call__(self, ids: Int[Array, "prompt token"]) -> TextEmbedding:
        words = nn.Embed(self.vocabulary, self.width, name="words")(ids)
        place = self.param(
            "place", nn.initializers.normal(0.02), (self.max_length, self.width)
        )
        context = words + place
        hidden = nn.Dense(2 * self.width, name="pool_1")(
            context.reshape(ids.shape[0], -1)
        )
        pooled = nn.Dense(self.width, name="pool_2")(nn.gelu(hidden))
        return TextEmbedding(context=context, pooled=jnp.asarray(pooled))
