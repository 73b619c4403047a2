"""Tokenizers of the embedded worlds: by words, or by the letters of a quoted text."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from flowgrpo_jax.models.text import PAD, UNKNOWN

# "a photo of a red circle" and "red circle" are the same picture.
STOP_WORDS = frozenset({"a", "an", "the", "photo", "of"})


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Turns words into ids; 0 is padding, 1 stands for every unknown word."""

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
    """Turns the letters of the text in double quotes into ids; ignores the rest."""

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
