"""Scores of a model on held-out prompts: the ODE, more steps, fixed noise.

Two columns: guided, as the model is used, and unguided, which shows what learning
put into the weights themselves. Beside them `eval_sde_gap`: how much more reward the
stochastic sampler of training gets than the ODE (arXiv 2510.10767).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.inference.pipeline import ImageSpec, Pipeline, Share, Sized
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.rewards.monitors import Monitor
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import cluster, metric_names
from flowgrpo_jax.runtime.samples import Sample

SAMPLES = 48  # images on the contact sheet, the same noise every time


class Evaluation(NamedTuple):
    """Scores of all columns; of the first one some images, and means of its prompts.

    Of several processes the first one has the images, and what monitors measured.
    """

    scores: dict[str, float]
    samples: list[Sample]
    by_prompt: list[dict[str, Any]]  # {"prompt", "tag", "images", "scores"} of each


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

    `sized`: the model at every size, with the samplers of all columns. `columns`: names
    of the deterministic ones, the first of which is the model as it is used; they go
    before those of the scores. `stochastic`: whether the reward of training's sampler
    is measured too, against the column named `deterministic`, which is guided alike.
    Images per task are of an evaluation during training, and of the first and last one.
    """

    images: ImageSpec
    sized: Sequence[Sized]
    columns: tuple[str, ...]
    images_per_task: int
    final_images_per_task: int
    stochastic: bool = False
    deterministic: str = metric_names.GUIDED


class Evaluator:
    """Evaluates weights on one prompt list; compiles once per column and size."""

    def __init__(
        self,
        spec: EvalSpec,
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
        self._pipeline = Pipeline(
            spec.images, spec.sized, mesh, variable_specs, prompts, text
        )

    def set_text(self, text: TextTable) -> None:
        """Take the prompts' embeddings (again, when the text encoder has moved)."""
        self._pipeline.set_text(text)

    def __call__(self, variables: Any, final: bool = False) -> Evaluation:
        """All scores of these weights; `final` for the full set of images."""
        prompt, member = self.chosen(final)
        prompts = [self._prompts[p] for p in prompt]
        scores: dict[str, float] = {}
        shown = self._shown(prompt, member)
        kept: dict[int, np.ndarray] = {}
        tables: list[Mapping[str, np.ndarray]] = []
        for column in self._spec.columns:
            measured, monitored = [], []
            for share, found in self._judged(variables, prompt, member, column):
                measured.append((share.places, found))
                images = share.whole()
                if images is None:  # another process looks at them
                    continue
                judged = [prompts[place] for place in share.places]
                if not tables:  # the first column
                    kept |= {
                        place: images[n].copy()
                        for n, place in enumerate(share.places.tolist())
                        if place in shown
                    }
                watched = self._monitor(images, judged, prompt[share.places])
                monitored.append((len(share.places), watched))
            tables.append(in_order(measured))
            scores |= summarize(tables[-1], prompts, column)
            scores |= {
                metric_names.monitor(name, column): value
                for name, value in mean(monitored).items()
            }
        if self._spec.stochastic:
            column = metric_names.STOCHASTIC
            rewards = [
                found["avg"]
                for _, found in self._judged(variables, prompt, member, column)
            ]
            reward = float(np.mean(np.concatenate(rewards)))
            ours = metric_names.reward(metric_names.AVERAGE, metric_names.STOCHASTIC)
            theirs = metric_names.reward(metric_names.AVERAGE, self._spec.deterministic)
            scores |= {ours: reward, metric_names.GAP: reward - scores[theirs]}
        samples = [
            Sample(
                kept[place],
                prompts[place].text,
                {name: float(values[place]) for name, values in tables[0].items()},
                prompts[place].metadata.get("tag", ""),
            )
            for place in shown
            if place in kept
        ]
        return Evaluation(scores, samples, by_prompt(tables[0], self._prompts, prompt))

    def _judged(
        self, variables: Any, prompt: np.ndarray, member: np.ndarray, column: str
    ) -> Iterator[tuple[Share, dict[str, np.ndarray]]]:
        """Images of every size, and the measurements that all processes made of them."""
        shares = self._pipeline.shares(variables, prompt, member, column)
        while True:
            cluster.together(self._check)  # before what devices must do together
            share = next(shares, None)
            if share is None:
                return
            own = share.places[share.own]
            told = cluster.together(functools.partial(self._here, share, prompt[own]))
            yield share, credit.joined(told, len(share.places))

    def _here(self, share: Share, prompt: np.ndarray) -> dict[str, Any]:
        """What the reward measures of this process's images, of these prompts."""
        self._check()
        prompts = [self._prompts[number] for number in prompt]
        measured = self._reward(share.images, prompts) if prompts else {}
        return {"numbers": [share.own] if prompts else [], "measured": measured}

    def chosen(self, final: bool) -> tuple[np.ndarray, np.ndarray]:
        """(prompt number, member) of every image of an evaluation."""
        spec = self._spec
        size = spec.final_images_per_task if final else spec.images_per_task
        return evaluation_set(self._prompts, size, every_prompt=final)

    def _shown(self, prompt: np.ndarray, member: np.ndarray) -> list[int]:
        """The places of the contact sheet: every task, the same images every time."""
        always = _pairs(*self.chosen(False)).keys() & _pairs(*self.chosen(True)).keys()
        place = _pairs(prompt, member)
        by_tag: dict[str, list[int]] = {}
        for pair in sorted(always):
            tag = self._prompts[pair[0]].metadata.get("tag", "")
            by_tag.setdefault(tag, []).append(place[pair])
        each = max(1, SAMPLES // len(by_tag))
        return [
            places[n]
            for places in by_tag.values()
            for n in np.linspace(0, len(places) - 1, min(each, len(places)), dtype=int)
        ][:SAMPLES]


def _pairs(prompt: np.ndarray, member: np.ndarray) -> dict[tuple[int, int], int]:
    """(prompt number, member) -> place."""
    pairs = zip(prompt.tolist(), member.tolist(), strict=True)
    return {pair: place for place, pair in enumerate(pairs)}


def by_prompt(
    measured: Mapping[str, np.ndarray], prompts: Sequence[Prompt], owner: np.ndarray
) -> list[dict[str, Any]]:
    """Mean measurements [sample] of every prompt that is the `owner` of any image."""
    return [
        {
            "prompt": prompts[number].text,
            "tag": prompts[number].metadata.get("tag", ""),
            "images": int(np.sum(owner == number)),
            "scores": {
                name: float(np.mean(values[owner == number]))
                for name, values in measured.items()
            },
        }
        for number in np.unique(owner).tolist()
    ]


def in_order(
    parts: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]],
) -> dict[str, np.ndarray]:
    """Measurements [sample] of all images, from (places, measurements) of some each."""
    order = np.argsort(np.concatenate([places for places, _ in parts]))
    return {
        name: np.concatenate([measured[name] for _, measured in parts])[order]
        for name in parts[0][1]
    }


def mean(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Means over all images, from (number of images, means) of some each.

    A part in which a value is NaN has nothing to tell of it.
    """
    if not parts:  # another process has looked at them
        return {}
    if len(parts) == 1:  # as it was measured, to the last bit
        return dict(parts[0][1])
    means = {}
    for name in parts[0][1]:
        counts = np.array([count for count, _ in parts], np.float64)
        values = np.array([found[name] for _, found in parts])
        known = np.isfinite(values)
        means[name] = float("nan")
        if known.any():
            means[name] = float(np.average(values[known], weights=counts[known]))
    return means


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
