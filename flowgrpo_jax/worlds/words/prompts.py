"""The words of this world, and which of them are held out."""

import functools
import hashlib

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.worlds.words.world import CONSONANTS, VOWELS

HELD_OUT = 8  # one word in eight


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """The words of "train" or "test", of 1,620: consonant, vowel, consonant."""
    every = [a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS]
    return tuple(word for word in every if _held_out(word) == (split == "test"))


def load(split: str) -> list[Prompt]:
    """The prompts of "train" or "test"."""
    return [Prompt(caption(w), {}, i) for i, w in enumerate(words(split))]


def caption(word: str) -> str:
    """The prompt that asks for a word."""
    return f'the word "{word}"'


def _held_out(word: str) -> bool:
    # By a hash, not drawn: a word stays on its side when other words are added.
    return hashlib.sha256(word.encode()).digest()[0] % HELD_OUT == 0
