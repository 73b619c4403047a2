"""GenEval prompt sets: the benchmark's test set, training sets, held-out prompts."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from flowgrpo_jax.data.geneval_grammar import (
    COCO,
    COCO80,
    COLORS10,
    COUNTS,
    RELATIONS,
    TASKS,
    Item,
    Request,
    Vocabulary,
    content,
    enumerate_requests,
    record,
    reworded,
)
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of

__all__ = [
    "COCO",
    "COCO80",
    "COLORS10",
    "TASKS",
    "TRAIN_PROPORTIONS",
    "Vocabulary",
    "enumerate_split",
    "generate",
    "train_list",
]

# Flow-GRPO's mixture (arXiv 2505.05470, section 4.1).
TRAIN_PROPORTIONS = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 0,
}
# With this number and seed the test set of COCO is the benchmark's 553 prompts.
TEST_NUM = 100
TEST_SEED = 43

_T = TypeVar("_T")


def generate(
    vocabulary: Vocabulary, split: Literal["train", "test"], num: int, seed: int
) -> list[Prompt]:
    """A prompt set over a large vocabulary such as COCO's.

    test: `num` draws per task (each class once for single_object), from which repeats
    are removed; (COCO, "test", TEST_NUM, TEST_SEED) gives the benchmark's 553 prompts.
    train: `num` prompts in all, in the proportions of TRAIN_PROPORTIONS, from all
    prompts of the grammar whose content is in no wording in that test set. A task with
    too few prompts repeats them, all equally often.
    """
    if split == "test":
        return _prompts(_test_requests(vocabulary, num, seed))
    test = _test_requests(vocabulary, TEST_NUM, TEST_SEED)
    tested = {*test, *map(reworded, test)}
    pools = {
        tag: [r for r in enumerate_requests(vocabulary, tag) if r not in tested]
        for tag, weight in TRAIN_PROPORTIONS.items()
        if weight
    }
    return _prompts(_mix(pools, num, seed, TRAIN_PROPORTIONS))


def enumerate_split(
    vocabulary: Vocabulary, test_fraction: Mapping[str, float | int]
) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): every prompt of a small vocabulary, split by content.

    Per task the given fraction of the contents is held out (rounded; at least 2, and at
    least one remains to train on, unless the fraction is 0 or 1). Those with the
    smallest SHA-256 are chosen, so the split depends on neither order nor seed. All
    wordings of one content are on one side. `index` counts both sides together.
    """
    held_out: set[Request] = set()
    requests: list[Request] = []
    for tag in TASKS:
        fraction = test_fraction.get(tag)
        if fraction is None or not 0 <= fraction <= 1:
            raise UserError(f"test_fraction.{tag}: {fraction}: must be within 0 and 1")
        task = list(enumerate_requests(vocabulary, tag))
        contents = sorted({content(request) for request in task}, key=_digest)
        num = round(fraction * len(contents))
        if 0 < fraction < 1:
            num = min(max(num, 2), len(contents) - 1)
        held_out.update(contents[:num])
        requests += task
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt, request in zip(_prompts(requests), requests, strict=True):
        sides[content(request) in held_out].append(prompt)
    return sides


def train_list(
    prompts: Sequence[Prompt],
    num: int,
    seed: int,
    proportions: Mapping[str, float | int] = TRAIN_PROPORTIONS,
) -> list[Prompt]:
    """`num` of the prompts, which have a "tag", shuffled and in these proportions.

    Tasks get exact shares (largest remainder) and, within a task, the numbers of
    times that two prompts appear differ by at most one.
    """
    pools: dict[str, list[Prompt]] = {tag: [] for tag in TASKS}
    for prompt in prompts:
        pools[prompt.metadata["tag"]].append(prompt)
    return _mix(pools, num, seed, proportions)


def _prompts(requests: Iterable[Request]) -> list[Prompt]:
    records: list[dict[str, Any]] = [record(request) for request in requests]
    return [Prompt(r["prompt"], r, index) for index, r in enumerate(records)]


def _digest(request: Request) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def _test_requests(vocabulary: Vocabulary, num: int, seed: int) -> list[Request]:
    """The benchmark's draws in the benchmark's order, without repeats."""
    rng = np.random.default_rng(seed)
    classes = vocabulary.classes
    order = rng.choice(len(classes), size=len(classes), replace=False)
    requests = [Request("single_object", (Item(classes[i]),)) for i in order]
    for tag in TASKS[1:]:
        requests += [_draw(rng, vocabulary, tag) for _ in range(num)]
    return list(dict.fromkeys(requests))


def _draw(rng: np.random.Generator, vocabulary: Vocabulary, tag: str) -> Request:
    """One random request; the order of the draws is the benchmark's."""

    def one(words: Sequence[_T]) -> _T:
        return words[rng.choice(len(words))]

    def two(words: Sequence[_T]) -> list[_T]:
        return [words[i] for i in rng.choice(len(words), size=2, replace=False)]

    match tag:
        case "two_object":
            a, b = two(vocabulary.classes)
            return Request(tag, (Item(a), Item(b)))
        case "counting":
            name = one(vocabulary.classes)
            count = int(rng.integers(COUNTS[0], COUNTS[-1], endpoint=True))
            return Request(tag, (Item(name, count),))
        case "colors":
            name, color = one(vocabulary.colored), one(vocabulary.colors)
            return Request(tag, (Item(name, 1, color),))
        case "position":
            a, b = two(vocabulary.classes)
            return Request(tag, (Item(a), Item(b)), one(RELATIONS))
        case "color_attr":
            a, b = two(vocabulary.colored)
            color_a, color_b = two(vocabulary.colors)
            return Request(tag, (Item(a, 1, color_a), Item(b, 1, color_b)))
    raise not_one_of("task", tag, TASKS[1:])


def _mix(
    pools: Mapping[str, Sequence[_T]],
    num: int,
    seed: int,
    proportions: Mapping[str, float | int],
) -> list[_T]:
    """`num` elements: exact shares of the non-empty pools, each pool used evenly."""
    weights = {tag: proportions.get(tag, 0) for tag in TASKS if pools.get(tag)}
    if num < 1 or sum(weights.values()) <= 0:
        raise UserError(
            f"num_prompts: {num}: no training prompts to draw (at least 1, and a task"
            f" with a positive proportion; tasks with prompts: {list(weights)})"
        )
    mixed: list[_T] = []
    for tag, share in _largest_remainder(weights, num).items():
        rng = np.random.default_rng([seed, TASKS.index(tag)])
        pool = pools[tag]
        rounds, rest = divmod(share, len(pool))
        mixed += list(pool) * rounds
        mixed += [pool[i] for i in rng.permutation(len(pool))[:rest]]
    order = np.random.default_rng([seed, len(TASKS)]).permutation(num)
    return [mixed[i] for i in order]


def _largest_remainder(weights: Mapping[str, float | int], num: int) -> dict[str, int]:
    """Integers that sum to `num` and are closest to the weights' proportions."""
    total = sum(weights.values())
    shares = {tag: num * weight / total for tag, weight in weights.items()}
    result = {tag: int(share) for tag, share in shares.items()}
    by_remainder = sorted(shares, key=lambda tag: result[tag] - shares[tag])
    for tag in by_remainder[: num - sum(result.values())]:
        result[tag] += 1
    return result
