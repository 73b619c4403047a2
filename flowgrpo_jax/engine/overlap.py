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

Images = Float[np.ndarray, "sample height width channel"]


class Sampled(NamedTuple):
    """Everything that was sampled, and the scores that are being made of it."""

    made: Any  # rollout.Rollout of all packs
    images: Images
    scores: list[Batch]


def sample(
    batches: Sequence[packing.Packed],
    start: Callable[[packing.Tables], tuple[Any, jax.Array]],
    join: Callable[..., Any],
    score: Callable[[Images, int], Batch],
) -> Sampled:
    """Sample the batches in turn; score each of them as soon as it is on the host.

    Args:
      batches: the packs of an iteration, as `packing.split` parts them.
      start: begins a rollout and its decoding, and returns before they are done.
      join: the rollouts of all batches in one (`programs.make_join`).
      score: begins to score images, of which the first has this number.
    """
    made: list[Any] = []
    images: list[Images] = []
    scores: list[Batch] = []

    def fetch(packed, decoded):
        arrived = packing.collect(jax.device_get(decoded), packed)
        arrived = arrived.reshape(-1, *arrived.shape[2:])
        scores.append(score(arrived, sum(map(len, images))))
        images.append(arrived)

    decoded: list[jax.Array] = []
    for number, packed in enumerate(batches):
        rollout, images_of_it = start(packed.tables)
        made.append(rollout)
        decoded.append(images_of_it)
        if number:  # only now does the host wait for the one before
            fetch(batches[number - 1], decoded[number - 1])
    fetch(batches[-1], decoded[-1])
    whole = made[0] if len(made) == 1 else join(*made)
    return Sampled(whole, np.concatenate(images), scores)
