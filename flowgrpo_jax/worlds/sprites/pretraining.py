"""Captioned scenes for pretraining: a batch is a pure function of (seed, iteration)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.data import geneval_grammar
from flowgrpo_jax.worlds.sprites import scenes, world
from flowgrpo_jax.worlds.sprites.prompts import VOCABULARY

# Tasks that request more are drawn more often.
TASK_SHARES = {
    "single_object": 0.05,
    "two_object": 0.15,
    "counting": 0.20,
    "colors": 0.10,
    "position": 0.25,
    "color_attr": 0.25,
}


class CaptionedScenes(NamedTuple):
    """Captions, and scenes that most of them describe correctly."""

    captions: list[str]
    scenes: world.Scene


class SceneStream:
    """Draws from all prompts of the world; from iteration `clean` on with mistakes.

    `noise` is the share of wrong pairs of each task. Clean captions first teach the
    model everything; noisy ones then teach it how far a caption can be trusted.
    """

    def __init__(
        self, seed: int, noise: Mapping[str, float], clean: int, dropout: float
    ):
        self._seed, self._noise = seed, noise
        self._clean, self._dropout = clean, dropout
        self._records = {
            tag: [
                geneval_grammar.record(request)
                for request in geneval_grammar.enumerate_requests(VOCABULARY, tag)
            ]
            for tag in TASK_SHARES
        }

    def batch(self, iteration: int, size: int) -> CaptionedScenes:
        """`size` pairs; a share `dropout` of the captions is empty, for guidance."""
        rng = np.random.default_rng((self._seed, iteration))
        tags = rng.choice(list(TASK_SHARES), size, p=list(TASK_SHARES.values()))
        records = [
            self._records[tag][rng.integers(len(self._records[tag]))] for tag in tags
        ]
        noise = self._noise if iteration >= self._clean else {}
        drawn = scenes.caption_pairs(records, noise, rng)
        kept = rng.random(size) >= self._dropout
        captions = [
            record["prompt"] if keep else ""
            for record, keep in zip(records, kept, strict=True)
        ]
        return CaptionedScenes(captions, drawn)
