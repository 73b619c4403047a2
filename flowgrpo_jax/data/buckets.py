"""Prompts by the size of their pictures: an iteration takes all of its from one bucket.

So an iteration is compiled for one size of latents, and an update never mixes them.
"""

from collections.abc import Mapping, Sequence

from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.runtime.resolution import Size

Buckets = Mapping[Size, Sequence[Prompt]]


def by_size(prompts: Sequence[Prompt], own: Size) -> Buckets:
    """The prompts of every size in rising order; those that ask for none have `own`."""
    found: dict[Size, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(prompt.size or own, []).append(prompt)
    return {size: found[size] for size in sorted(found)}


def batch(
    buckets: Buckets, seed: int, iteration: int, prompts_per_iteration: int
) -> tuple[Size, list[Prompt]]:
    """Size and prompts of one iteration: a pure function of (seed, iteration).

    In an epoch every bucket has as many iterations as it fills with its prompts, and at
    least one; they are spread evenly over the epoch. Within a bucket its prompts come
    as `prompts.batch` deals them, so that one bucket alone is nothing else than that.
    """
    share = {
        size: max(len(prompts) // prompts_per_iteration, 1)
        for size, prompts in buckets.items()
    }
    turns = tuple(str(size) for size, count in share.items() for _ in range(count))
    epoch, place = divmod(iteration, len(turns))
    order = prompt_data.epoch_order(turns, seed, epoch)
    size = next(one for one in share if str(one) == turns[order[place]])
    # The turns of a size come in their order: which of them this is tells the batch.
    number = order[place] - turns.index(str(size))
    chosen = prompt_data.batch(
        buckets[size], seed, epoch * share[size] + number, prompts_per_iteration
    )
    return size, chosen
