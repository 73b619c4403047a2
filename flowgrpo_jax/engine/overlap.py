"""A rollout in batches: while one is sampled, the one before it is scored.

The noise of a sample follows from its numbers and packs stay whole, so images, scores
and all that comes of them are the same for any number of batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from flowgrpo_jax.flow import packing
from flowgrpo_jax.rewards.scoring import Batch
from flowgrpo_jax.runtime import mesh as meshes

Images = Float[np.ndarray, "sample height width channel"]


class Sampled(NamedTuple):
    """Everything that was sampled, and the scores that are being made of it.

    `scores`: of batches of the images that this process holds, with their numbers.
    """

    made: Any  # rollout.Rollout of all packs
    scores: list[tuple[np.ndarray, Batch]]


def sample(
    batches: Sequence[packing.Packed],
    start: Callable[[packing.Tables], tuple[Any, jax.Array]],
    join: Callable[..., Any],
    score: Callable[[Images, np.ndarray], Batch],
) -> Sampled:
    """Sample the batches in turn; score each of them as soon as it is on the host.

    Args:
      batches: the packs of an iteration, as `packing.split` parts them.
      start: begins a rollout and its decoding, and returns before they are done.
      join: the rollouts of all batches in one (`programs.make_join`).
      score: begins to score images with these numbers, prompt after prompt.
    """
    made: list[Any] = []
    scores: list[tuple[np.ndarray, Batch]] = []
    jobs_before = 0

    def fetch(packed, decoded):
        nonlocal jobs_before
        pack, values = meshes.own_rows(decoded)
        jobs, arrived = packing.collect_some(values, packed, pack)
        first = jobs_before * arrived.shape[1]
        jobs_before += len(packed.place)
        numbers = packing.numbers(jobs, arrived.shape[1]) + first
        if len(numbers):
            images = arrived.reshape(-1, *arrived.shape[2:])
            scores.append((numbers, score(images, numbers)))

    decoded: list[jax.Array] = []
    for number, packed in enumerate(batches):
        rollout, images_of_it = start(packed.tables)
        made.append(rollout)
        decoded.append(images_of_it)
        if number:  # only now does the host wait for the one before
            fetch(batches[number - 1], decoded[number - 1])
    fetch(batches[-1], decoded[-1])
    whole = made[0] if len(made) == 1 else join(*made)
    return Sampled(whole, scores)
