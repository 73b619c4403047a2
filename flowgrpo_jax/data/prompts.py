"""Prompts, and the batches of them that the iterations of a run use."""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import resolution
from flowgrpo_jax.runtime.resolution import Size


@dataclass(frozen=True)
class Prompt:
    """A text, the metadata that rewards read, and the fixed index in its set."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    index: int = 0

    @property
    def size(self) -> Size | None:
        """The size of picture that its line asks for; None for the run's own."""
        return resolution.parse(self.metadata.get("resolution", 0))


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hex, of the texts and metadata of these prompts, in order.

    Two lists with the same digest give the same run: neither their file nor the order
    of the keys in a record matters.
    """
    whole = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.text, dict(prompt.metadata)]
        whole.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return whole.hexdigest()


def batch(
    prompts: Sequence[Prompt], seed: int, iteration: int, prompts_per_iteration: int
) -> list[Prompt]:
    """The prompts of one iteration: a pure function of (seed, iteration).

    Each epoch is a new permutation that depends on (seed, epoch), cut into
    `len(prompts) // prompts_per_iteration` iterations; the rest is left out of this
    epoch. The texts of one iteration are distinct whenever the list has enough distinct
    ones: a text that was already chosen is skipped for the next one in the permutation,
    which may then appear in the following iteration too.
    """
    if not prompts:
        raise UserError("prompts: []: at least one prompt is needed")
    if prompts_per_iteration < 1:
        raise UserError(
            f"prompts_per_iteration: {prompts_per_iteration}: must be at least 1"
        )
    texts = tuple(prompt.text for prompt in prompts)
    iterations_per_epoch = max(len(prompts) // prompts_per_iteration, 1)
    epoch, step = divmod(iteration, iterations_per_epoch)
    order = epoch_order(texts, seed, epoch)
    start = step * prompts_per_iteration

    chosen: list[int] = []
    repeated: list[int] = []
    seen: set[str] = set()
    for offset in range(len(order)):
        index = order[(start + offset) % len(order)]
        (repeated if texts[index] in seen else chosen).append(index)
        seen.add(texts[index])
        if len(chosen) == prompts_per_iteration:
            break
    missing = prompts_per_iteration - len(chosen)
    chosen += itertools.islice(itertools.cycle(repeated + chosen), missing)
    return [prompts[index] for index in chosen]


@functools.lru_cache(maxsize=32)  # more than a run has buckets
def epoch_order(texts: tuple[str, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """A random order in which the copies of one text are spread evenly.

    Copy j of a text with m copies is put at (j + u) / m, with one uniform u per text.
    Without copies this is a uniformly random permutation. With copies, the proportions
    of the list hold in every part of the epoch.
    """
    ids: dict[str, int] = {}
    text_id = np.array([ids.setdefault(text, len(ids)) for text in texts])
    copies = np.bincount(text_id)
    seen = np.zeros_like(copies)
    copy = np.empty(len(texts))
    for index, text in enumerate(text_id):
        copy[index] = seen[text]
        seen[text] += 1
    start = np.random.default_rng([seed, epoch]).random(len(ids))
    place = (copy + start[text_id]) / copies[text_id]
    return tuple(int(index) for index in np.argsort(place, kind="stable"))
