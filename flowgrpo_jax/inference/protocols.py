"""Frozen ways to measure a model, so that its numbers stand beside those of papers.

Each fixes what a number depends on: prompts, images per prompt, steps, reward. Guidance
is the model's own (`eval.guidance_scale`), the negative prompt is empty, the noise is
a function of `eval.seed`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.inference import evaluator, restore
from flowgrpo_jax.inference.pipeline import Pipeline
from flowgrpo_jax.rewards import registry

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


def configure(config: ConfigDict, name: str, prompts: str | None = None) -> ConfigDict:
    """The config as the protocol has it; `prompts` is a set or file in place of its own.

    UserError for an unknown protocol, or for one that needs a list of prompts.
    """
    if name not in PROTOCOLS:
        raise configs.not_one_of("--protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    if not (prompts or protocol.prompts):
        raise UserError(
            f"--protocol: {name}: needs its prompts: give --prompts=FILE.txt or .jsonl"
        )
    config = configs.from_json(config.to_dict())
    config.eval.prompts = prompts or protocol.prompts
    config.sample.eval_num_steps = protocol.num_steps
    if protocol.reward:
        values = config.to_dict()
        values["eval"]["reward"] = dict(protocol.reward)
        config = configs.from_json(values)
    checks.check(config)
    return config


def measure(
    config: ConfigDict,
    restored: restore.Restored,
    images_per_prompt: int,
    max_prompts: int | None = None,
    rewards: registry.Context | None = None,
) -> dict[str, float]:
    """Scores of a configured protocol; `max_prompts` takes that many of every task.

    `rewards` is the context of `assemble.try_rewards`, if it was called.

    Beside the means of all measurements: accuracy by task, and GenEval's "images" and
    "prompts", the shares of images, and of prompts with any image, that are right.
    """
    prompts = assemble.load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    if max_prompts is not None:
        prompts = _first_of_each_task(prompts, max_prompts)
    context = rewards or assemble.reward_context(config)
    assemble.check_prompts(config, context, prompts, "eval.prompts")
    reward = assemble.make_eval_reward(config, context)
    owner = np.repeat(np.arange(len(prompts)), images_per_prompt)
    parts = []
    for numbers, images in _images(config, restored, prompts, images_per_prompt):
        parts.append(reward(images, [prompts[n] for n in owner[numbers]]))
    measured = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    scores = evaluator.summarize(measured, [prompts[n] for n in owner], "")
    if "accuracy" in measured:
        right = measured["accuracy"].reshape(len(prompts), images_per_prompt)
        scores["images"] = float(right.mean())
        scores["prompts"] = float(right.max(axis=1).mean())
    return scores


def record(config: ConfigDict, name: str, max_prompts: int | None) -> dict[str, Any]:
    """What the JSON says about how the scores came about."""
    return {
        "protocol": name,
        "prompts": config.eval.prompts,
        "whole": max_prompts is None,  # else no number to compare
        "images_per_prompt": PROTOCOLS[name].images_per_prompt,
        "num_steps": config.sample.eval_num_steps,
        "guidance_scale": config.eval.guidance_scale,
        "negative_prompt": "",
    }


def table(scores: Mapping[str, float], model: str) -> str:
    """A row of the papers' table, as Markdown: GenEval by task, else by reward."""
    if "overall_accuracy" in scores:
        cells = {
            column: scores[f"{task}_accuracy"]
            for column, task in _GENEVAL_COLUMNS.items()
            if f"{task}_accuracy" in scores
        }
    else:
        cells = {
            name.removeprefix("reward_"): value
            for name, value in scores.items()
            if name.startswith("reward_") and name != "reward_avg"
        }
    rows = [
        ["model", *cells],
        ["---"] * (len(cells) + 1),
        [model, *(f"{value:.2f}" for value in cells.values())],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _first_of_each_task(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    seen: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        tag = prompt.metadata.get("tag", "")
        seen[tag] = seen.get(tag, 0) + 1
        if seen[tag] <= count:
            chosen.append(prompt)
    return chosen


def _images(
    config: ConfigDict,
    restored: restore.Restored,
    prompts: Sequence[Prompt],
    images_per_prompt: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers, images) of all images, prompt after prompt, some at a time."""
    texts = [prompt.text for prompt in prompts]
    placed = restore.place(config, restored, texts)
    sampler = assemble.make_eval_sampler(
        config, restored.model, config.eval.guidance_scale
    )
    pipeline = Pipeline(
        config,
        restored.model,
        placed.mesh,
        placed.specs,
        texts,
        placed.text,
        {"eval": sampler},
    )
    total = len(prompts) * images_per_prompt
    # Whole prompts, since a reward may compare the images of one.
    step = max(1, _IMAGES_AT_ONCE // images_per_prompt) * images_per_prompt
    step = min(step, total)
    for start in range(0, total, step):
        numbers = np.arange(start, min(start + step, total))
        padded = np.resize(numbers, step)  # one shape: compiled once
        prompt, member = np.divmod(padded, images_per_prompt)
        images = pipeline.images(placed.variables, prompt, member, "eval")
        yield numbers, images[: len(numbers)]
