"""Iterations of prompts of several sizes."""

from collections import Counter

import pytest

from flowgrpo_jax.data import buckets
from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.runtime.resolution import Size

OWN, TALL, WIDE = Size(64, 64), Size(96, 48), Size(48, 96)


def prompts(count, size=None, first=0):
    said = {} if size is None else {"resolution": str(size)}
    numbers = range(first, first + count)
    return [Prompt(f"prompt {number}", said, number) for number in numbers]


def test_prompts_are_parted_by_size():
    """Oracle: by hand; a size that is said and is the run's own is the same bucket."""
    listed = [*prompts(1, WIDE), *prompts(1, None, 1), *prompts(1, OWN, 2)]
    listed += prompts(1, TALL, 3)
    found = buckets.by_size(listed, OWN)
    assert list(found) == [WIDE, OWN, TALL]  # in rising order
    assert [[p.index for p in some] for some in found.values()] == [[0], [1, 2], [3]]
    assert buckets.by_size([], OWN) == {}


def test_one_bucket_is_a_run_without_buckets():
    """Oracle: `prompts.batch`, iteration by iteration, over several epochs."""
    listed = prompts(23)
    for iteration in range(20):
        size, found = buckets.batch({OWN: listed}, 7, iteration, 4)
        assert size == OWN and found == prompt_data.batch(listed, 7, iteration, 4)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_goes_through_every_bucket(epoch):
    """Oracle: counting; 12, 6 and 3 prompts are 4, 2 and 1 iterations of 3."""
    parted = buckets.by_size(
        prompts(12) + prompts(6, TALL, 12) + prompts(3, WIDE, 18), OWN
    )
    drawn = [buckets.batch(parted, 3, 7 * epoch + i, 3) for i in range(7)]
    assert Counter(size for size, _ in drawn) == {OWN: 4, TALL: 2, WIDE: 1}
    for size, some in drawn:
        assert {prompt.size or OWN for prompt in some} == {size}
    assert sorted(p.index for _, some in drawn for p in some) == list(range(21))
    # Spread over the epoch: never more than two iterations of the largest in a row
    # within one half of it.
    halves = [Counter(size for size, _ in drawn[part]) for part in (slice(3), slice(4))]
    assert halves[0][OWN] <= 2 and halves[1][OWN] >= 1
    assert buckets.batch(parted, 3, 7 * epoch, 3) == drawn[0]  # of no earlier call


def test_a_bucket_of_few_prompts_fills_an_iteration():
    """Oracle: by hand; its prompts come again, as in a run of nothing else."""
    parted = buckets.by_size(prompts(8) + prompts(1, TALL, 8), OWN)
    drawn = [buckets.batch(parted, 0, iteration, 4) for iteration in range(3)]
    [few] = [some for size, some in drawn if size == TALL]
    assert [prompt.index for prompt in few] == [8] * 4
