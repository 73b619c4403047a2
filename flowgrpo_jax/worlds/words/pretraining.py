"""Captioned words for pretraining: a batch is a pure function of (seed, iteration)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.worlds.words import prompts, world


class CaptionedWords(NamedTuple):
    """Captions, and strips that most of them describe correctly."""

    captions: list[str]
    scenes: world.Strip


class WordStream:
    """Draws from all words but those held out; from iteration `clean` on with mistakes.

    `noise["letter"]` is the share of letters that are replaced, vowels by vowels and
    consonants by consonants. A model that has learned that share spells a word
    correctly with probability (1 - noise)^3.
    """

    def __init__(
        self, seed: int, noise: Mapping[str, float], clean: int, dropout: float
    ):
        self._seed, self._clean, self._dropout = seed, clean, dropout
        self._noise = noise.get("letter", 0.0)
        self._words = prompts.words("train")
        self._letters = np.array([[*map(world.LETTERS.index, w)] for w in self._words])

    def batch(self, iteration: int, size: int) -> CaptionedWords:
        """`size` pairs; a share `dropout` of the captions is empty, for guidance."""
        rng = np.random.default_rng((self._seed, iteration))
        chosen = rng.integers(len(self._words), size=size)
        noise = self._noise if iteration >= self._clean else 0.0
        strip = world.Strip(
            letter=misspelled(self._letters[chosen], noise, rng).astype(np.int32),
            ink=rng.integers(len(world.INKS), size=size).astype(np.int32),
            shift=rng.integers(world.SHIFTS, size=size).astype(np.int32),
        )
        kept = rng.random(size) >= self._dropout
        captions = [
            prompts.caption(self._words[word]) if keep else ""
            for word, keep in zip(chosen, kept, strict=True)
        ]
        return CaptionedWords(captions, strip)


def misspelled(
    letters: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """The letters, with a share of them replaced by others of the same kind."""
    vowels = len(world.VOWELS)
    first = np.where(letters < vowels, 0, vowels)
    kinds = np.where(letters < vowels, vowels, len(world.CONSONANTS))
    other = first + (letters - first + rng.integers(1, kinds)) % kinds
    return np.where(rng.random(letters.shape) < share, other, letters)
