"""Scores of a model on held-out prompts: the ODE, more steps, fixed noise.

Two columns: guided, as the model is used, and unguided, which shows what learning
put into the weights themselves. Beside them `eval_sde_gap`: how much more reward the
stochastic sampler of training gets than the ODE (arXiv 2510.10767).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.inference.pipeline import ImageSpec, Pipeline
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.rewards.monitors import Monitor
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import metric_names


def evaluation_set(
    prompts: Sequence[Prompt], images_per_task: int, every_prompt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which images to make: (prompt number, member) of each.

    Every task gets at least `images_per_task` images: small tasks repeat their prompts
    with other noise. Large ones are thinned evenly, unless `every_prompt` is wanted.
    """
    tags = np.array([prompt.metadata.get("tag", "") for prompt in prompts])
    chosen, members = [], []
    for tag in dict.fromkeys(tags):
        numbers = np.flatnonzero(tags == tag)
        if len(numbers) > images_per_task and not every_prompt:
            pick = np.linspace(0, len(numbers) - 1, images_per_task).round()
            numbers = numbers[pick.astype(int)]
        repeats = -(-images_per_task // len(numbers))
        chosen.append(np.repeat(numbers, repeats))
        members.append(np.tile(np.arange(repeats), len(numbers)))
    return np.concatenate(chosen), np.concatenate(members)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """How many images, and which samplers make them.

    `columns`: name -> sampler of the deterministic columns, the first of which is the
    model as it is used; names go before those of the scores. `stochastic`: training's
    sampler, if its reward is measured too, against the column named `deterministic`,
    which is guided alike. Images per task are of an evaluation during training, and of
    the first and the last one.
    """

    images: ImageSpec
    columns: Mapping[str, rollout.Sampler]
    images_per_task: int
    final_images_per_task: int
    stochastic: rollout.Sampler | None = None
    deterministic: str = metric_names.GUIDED


class Evaluator:
    """Evaluates weights on one prompt list; compiles once per column."""

    def __init__(
        self,
        spec: EvalSpec,
        model: FlowModel,
        mesh: jax.sharding.Mesh,
        variable_specs: Any,
        prompts: Sequence[Prompt],
        text: TextTable,
        reward: Reward,
        monitor: Monitor,
        check: Callable[[], None] = lambda: None,
    ):
        self._spec, self._prompts = spec, prompts
        self._check = check  # called between parts; what it raises comes out
        self._reward, self._monitor = reward, monitor
        samplers = dict(spec.columns)
        if spec.stochastic is not None:
            samplers[metric_names.STOCHASTIC] = spec.stochastic
        texts = [prompt.text for prompt in prompts]
        self._pipeline = Pipeline(
            spec.images, model, mesh, variable_specs, texts, text, samplers
        )

    def set_text(self, text: TextTable) -> None:
        """Take the prompts' embeddings (again, when the text encoder has moved)."""
        self._pipeline.set_text(text)

    def __call__(self, variables: Any, final: bool = False) -> dict[str, float]:
        """All scores of these weights; `final` for the full set of images."""
        prompt, member = self.chosen(final)
        prompts = [self._prompts[p] for p in prompt]
        scores: dict[str, float] = {}
        for column in self._spec.columns:
            self._check()
            images = self._pipeline.images(variables, prompt, member, column)
            self._check()
            measured = self._reward(images, prompts)
            scores |= summarize(measured, prompts, column)
            monitored = self._monitor(images, prompts, prompt)
            scores |= {metric_names.monitor(k, column): v for k, v in monitored.items()}
        if self._spec.stochastic is not None:
            self._check()
            images = self._pipeline.images(
                variables, prompt, member, metric_names.STOCHASTIC
            )
            reward = float(np.mean(self._reward(images, prompts)["avg"]))
            ours = metric_names.reward(metric_names.AVERAGE, metric_names.STOCHASTIC)
            theirs = metric_names.reward(metric_names.AVERAGE, self._spec.deterministic)
            scores |= {ours: reward, metric_names.GAP: reward - scores[theirs]}
        return scores

    def chosen(self, final: bool) -> tuple[np.ndarray, np.ndarray]:
        """(prompt number, member) of every image of an evaluation."""
        spec = self._spec
        size = spec.final_images_per_task if final else spec.images_per_task
        return evaluation_set(self._prompts, size, every_prompt=final)

    def images(
        self, variables: Any, prompt: np.ndarray, member: np.ndarray
    ) -> np.ndarray:
        """Guided images [sample, height, width, 3] of prompt numbers and members."""
        return self._pipeline.images(variables, prompt, member, metric_names.GUIDED)


def summarize(
    measured: Mapping[str, np.ndarray], prompts: Sequence[Prompt], column: str
) -> dict[str, float]:
    """Means of all measurements; accuracy by task and overall where it is measured."""
    scores = {
        metric_names.reward(name, column): float(np.mean(values))
        for name, values in measured.items()
    }
    by_task = {}
    if "accuracy" in measured:
        by_task = geneval.by_task(prompts, measured["accuracy"])
    if by_task:
        by_task |= {metric_names.OVERALL: geneval.overall(by_task)}
        scores |= {
            metric_names.accuracy(task, column): v for task, v in by_task.items()
        }
    return scores


def table(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> str:
    """Accuracy by task as text: guided and unguided, before and after if given.

    Where no reward measures accuracy, the rewards.
    """
    read = [metric_names.parse(name) for name in before]
    guided = [one for one in read if one.column == metric_names.GUIDED]
    tasks = [one.name for one in guided if one.kind == "accuracy"]
    runs = [("", before)] if after is None else [(" before", before), (" after", after)]
    columns = [
        (
            f"{kind}{when}",
            [scores[metric_names.accuracy(task, column)] for task in tasks],
        )
        for kind, column in (
            ("guided", metric_names.GUIDED),
            ("unguided", metric_names.UNGUIDED),
        )
        for when, scores in runs
        if metric_names.accuracy(metric_names.OVERALL, column) in scores
    ]
    if not tasks:
        rewards = [one.name for one in guided if one.kind == "reward"]
        return _reward_table(rewards, [scores for _, scores in runs])
    lines = [f"{'accuracy':<15}" + "".join(f"{head:>18}" for head, _ in columns)]
    for row, task in enumerate(tasks):
        cells = "".join(f"{100 * cells[row]:>17.1f}%" for _, cells in columns)
        lines.append(f"{task:<15}{cells}")
    return "\n".join(lines)


def _reward_table(rewards: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean rewards as text, a column per run."""
    keys = [metric_names.reward(name, metric_names.GUIDED) for name in rewards]
    lines = [
        f"{key:<40}" + "".join(f"{scores[key]:>12.4g}" for scores in runs)
        for key in keys
    ]
    return "\n".join(lines)
