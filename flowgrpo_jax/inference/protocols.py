"""Frozen ways to measure a model, so that its numbers stand beside those of papers.

Each fixes what a number depends on: prompts, images per prompt, steps, reward. Guidance
is the model's own (`eval.guidance_scale`), the negative prompt is empty, the noise is
a function of `eval.seed`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.inference.pipeline import Pipeline
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import metric_names

NUM_STEPS = 40
_IMAGES_AT_ONCE = 128  # a multiple of every usual microbatch; more would fill the host


@dataclass(frozen=True)
class Protocol:
    """What is fixed. Without `prompts` a file must be given; without `reward` the
    config's `eval.reward` is measured."""

    images_per_prompt: int = 1
    reward: Mapping[str, float] = field(default_factory=dict)
    prompts: str = ""
    num_steps: int = NUM_STEPS


PROTOCOLS = {
    # The benchmark's 553 prompts come out of our generator (data/geneval_prompts.py).
    "geneval": Protocol(4, {"geneval": 1.0}, "coco"),
    "ocr": Protocol(reward={"ocr": 1.0}),
    "pickscore": Protocol(reward={"pickscore": 1.0}),
    "drawbench": Protocol(),
}
# Columns of the papers' table: name -> task.
_GENEVAL_COLUMNS = {
    "Overall": "overall",
    "Single": "single_object",
    "Two": "two_object",
    "Count": "counting",
    "Colors": "colors",
    "Position": "position",
    "Attr": "color_attr",
}


def measure(
    pipeline: Pipeline,
    variables: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    images_per_prompt: int,
) -> dict[str, float]:
    """Scores of the prompts of a pipeline, by its sampler "ode".

    Beside the means of all measurements: accuracy by task, and GenEval's "images" and
    "prompts", the shares of images, and of prompts with any image, that are right.
    """
    owner = np.repeat(np.arange(len(prompts)), images_per_prompt)
    measured = evaluator.in_order(
        [
            (numbers, reward(images, [prompts[int(n)] for n in owner[numbers]]))
            for numbers, images in _images(
                pipeline, variables, len(prompts), images_per_prompt
            )
        ]
    )
    scores = evaluator.summarize(
        measured, [prompts[int(n)] for n in owner], metric_names.PLAIN
    )
    if "accuracy" in measured:
        right = measured["accuracy"].reshape(len(prompts), images_per_prompt)
        scores["images"] = float(right.mean())
        scores["prompts"] = float(right.max(axis=1).mean())
    return scores


def table(scores: Mapping[str, float], model: str) -> str:
    """A row of the papers' table, as Markdown: GenEval by task, else by reward."""
    tasks = {
        column: metric_names.accuracy(task, metric_names.PLAIN)
        for column, task in _GENEVAL_COLUMNS.items()
    }
    if tasks["Overall"] in scores:
        cells = {column: scores[key] for column, key in tasks.items() if key in scores}
    else:
        cells = {
            metric_names.parse(key).name: value
            for key, value in scores.items()
            if metric_names.parse(key).kind == "reward"
            and key != metric_names.REWARD_AVERAGE
        }
    rows = [
        ["model", *cells],
        ["---"] * (len(cells) + 1),
        [model, *(f"{value:.2f}" for value in cells.values())],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def first_of_each_task(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts of every task, in their order."""
    seen: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        tag = prompt.metadata.get("tag", "")
        seen[tag] = seen.get(tag, 0) + 1
        if seen[tag] <= count:
            chosen.append(prompt)
    return chosen


def _images(
    pipeline: Pipeline, variables: Any, num_prompts: int, images_per_prompt: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers, images) of all images, prompt after prompt, some of a size at a time."""
    # Whole prompts, since a reward may compare the images of one.
    most = max(1, _IMAGES_AT_ONCE // images_per_prompt) * images_per_prompt
    owner = np.repeat(np.arange(num_prompts), images_per_prompt)
    for of_size in pipeline.by_size(owner):
        step = min(most, len(of_size))
        for start in range(0, len(of_size), step):
            numbers = of_size[start : start + step]
            padded = np.resize(numbers, step)  # one shape: compiled once
            prompt, member = np.divmod(padded, images_per_prompt)
            images = pipeline.images(variables, prompt, member, "ode")
            yield numbers, images[: len(numbers)]
