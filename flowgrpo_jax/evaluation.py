"""Scores of a model on held-out prompts: the ODE, more steps, fixed noise.

Two columns: guided, as the model is used, and unguided, which shows what learning
put into the weights themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from flowgrpo_jax import assemble, programs
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.flow import layout as layouts
from flowgrpo_jax.flow.plan import Tables
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.rewards import geneval
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import mesh as meshes


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


class Evaluator:
    """Evaluates weights on one prompt list; compiles once per column."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: FlowModel,
        mesh: jax.sharding.Mesh,
        variable_specs: Any,
        prompts: Sequence[Prompt],
        text: assemble.TextTable,
        reward: Reward,
    ):
        self._config, self._mesh, self._prompts = config, mesh, prompts
        self._reward = reward
        self._monitor = assemble.make_monitor(config)
        self.set_text(text)
        self._decode = programs.make_decode(mesh, model.autoencoder.decode)
        scales = {"eval_": config.eval.guidance_scale}
        if config.eval.guidance_scale != 1.0:
            scales["eval_unguided_"] = 1.0
        self._columns = {
            prefix: programs.make_rollout(
                mesh,
                variable_specs,
                assemble.make_eval_sampler(config, model, scale),
                model.latent_shape,
            )
            for prefix, scale in scales.items()
        }

    def set_text(self, text: assemble.TextTable) -> None:
        """Take the prompts' embeddings (again, when the text encoder has moved)."""
        rows = text.rows([prompt.text for prompt in self._prompts])
        self._text, self._empty = meshes.place(
            (rows, text.empty), programs.WHOLE, self._mesh
        )

    def __call__(self, variables: Any, final: bool = False) -> dict[str, float]:
        """All scores of these weights; `final` for the full set of images."""
        options = self._config.eval
        size = options.final_images_per_task if final else options.images_per_task
        prompt, member = evaluation_set(self._prompts, size, every_prompt=final)
        prompts = [self._prompts[p] for p in prompt]
        scores: dict[str, float] = {}
        for prefix in self._columns:
            images = self.images(variables, prompt, member, prefix)
            measured = self._reward(images, prompts)
            scores |= summarize(measured, prompts, prefix)
            monitored = self._monitor(images, prompt)
            scores |= {f"{prefix}{name}": value for name, value in monitored.items()}
        return scores

    def images(
        self,
        variables: Any,
        prompt: np.ndarray,
        member: np.ndarray,
        column: str = "eval_",
    ) -> np.ndarray:
        """Images [sample, height, width, 3] of these prompt numbers and members."""
        mesh, config = self._mesh, self._config
        layout = layouts.layout_of(prompt, member, 1, config.microbatch, mesh.size)
        tables = Tables(
            np.zeros((len(self._prompts), config.sample.eval_num_steps), np.float32),
            np.zeros((len(self._prompts), 0), np.int32),
        )
        _, clean = self._columns[column](
            variables,
            meshes.random_key(mesh, config.eval.seed),
            meshes.place(layout, programs.SPLIT, mesh),
            meshes.place(tables, programs.WHOLE, mesh),
            self._text,
            self._empty,
        )
        return layouts.collect(jax.device_get(self._decode(clean)), layout)


def summarize(
    measured: Mapping[str, np.ndarray], prompts: Sequence[Prompt], prefix: str
) -> dict[str, float]:
    """Means of all measurements; accuracy by task and overall where it is measured."""
    scores = {
        f"{prefix}reward_{name}": float(np.mean(values))
        for name, values in measured.items()
    }
    if "accuracy" in measured:
        by_task = geneval.by_task(prompts, measured["accuracy"])
        scores |= {f"{prefix}{task}_accuracy": value for task, value in by_task.items()}
        scores[f"{prefix}overall_accuracy"] = geneval.overall(by_task)
    return scores


def table(before: Mapping[str, float], after: Mapping[str, float] | None = None) -> str:
    """Accuracy by task as text: guided and unguided, before and after."""
    tasks = [
        name[len("eval_") : -len("_accuracy")]
        for name in before
        if name.endswith("_accuracy")
        and not name.startswith(("eval_unguided_", "eval_reward_"))
    ]
    columns = [("before", before)] + ([("after", after)] if after else [])
    head = f"{'accuracy':<15}" + "".join(
        f"{f'{kind} {when}':>18}"
        for kind in ("guided", "unguided")
        for when, _ in columns
    )
    lines = [head]
    for task in tasks:
        cells = [
            scores.get(f"{prefix}{task}_accuracy", float("nan"))
            for prefix in ("eval_", "eval_unguided_")
            for _, scores in columns
        ]
        lines.append(f"{task:<15}" + "".join(f"{100 * c:>17.1f}%" for c in cells))
    return "\n".join(lines)
