"""What one run consists of: model, data, rewards and compiled programs, and a step.

An iteration: prompts(seed, i) -> embeddings -> rollout -> decode -> rewards ->
advantages -> updates. Pretraining is the same step whose samples are captioned scenes
and whose objective is flow matching.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from flowgrpo_jax import assemble
from flowgrpo_jax.assemble import base_weights, prompt_checks, text_table
from flowgrpo_jax.assemble.text_table import TextTable
from flowgrpo_jax.cost import budget
from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit, overlap, programs
from flowgrpo_jax.engine.workload import Workload
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.models.flow_model import Variables, decoding, overlay
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.scoring import RewardFailure
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.runtime import mesh as meshes

MOST_LOST = 3  # iterations in a row without any reward, where failures are skipped
SAMPLES = 48  # images on the contact sheet, the same noise every time


class Run:
    """Model, data, rewards and compiled programs of one run.

    `check` is called wherever a step or an evaluation may be given up: what it raises
    comes out of them, and the state is as it was.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        rewards: registry.Context | None = None,
    ):
        self.config = config
        self.check: Callable[[], None] = lambda: None
        self._reward_context = rewards or assemble.reward_context(config)
        self.mesh = meshes.make_mesh(config.mesh.to_dict())
        self.model, self._loaded = assemble.starting_model(config, self.mesh)
        self.work = Workload(config, self.mesh, self.model, self._loaded)
        self.model = self.work.model
        self.pretraining = self.work.pretraining
        self.images_per_iteration = config.prompts_per_iteration
        if not self.pretraining:
            self.images_per_iteration *= len(self.work.planner.kinds[0].leaves)
        self._set_up_weights()
        self._set_up_data()
        judge = assemble.make_eval_reward(config, self._reward_context)
        self._reward.check = judge.check = self._check
        self._evaluator = evaluator.Evaluator(
            config,
            self.model,
            self.mesh,
            self.work.variables_specs,
            self._eval_prompts,
            self._text,
            judge,
            assemble.make_monitor(config, self._reward_context),
            check=self._check,
        )

    def _check(self) -> None:
        self.check()

    # -- set-up --------------------------------------------------------------------

    def _set_up_weights(self) -> None:
        work = self.work
        trainable = assemble.trainable_part(self.config, self.model, self._loaded)
        self._initial = assemble.warm_start(self.config, self.model, trainable)
        frozen = work.frozen_part(self._loaded, self._initial)
        self._frozen = meshes.place(frozen, work.frozen_specs, self.mesh)

    def _set_up_data(self) -> None:
        config = self.config
        self._prompts: list[Prompt] = []
        self._eval_prompts = assemble.load_prompt_set(
            config.eval.prompts, "test", "eval.prompts"
        )
        texts = [prompt.text for prompt in self._eval_prompts]
        if self.pretraining:
            self._scenes = self.work.world.stream(
                config.seed,
                config.train.caption_noise.to_dict(),
                config.train.clean_iterations,
                config.train.caption_dropout,
            )
        else:
            self._prompts = assemble.load_prompt_set(config.prompts, "train")
            texts += self._first_texts()
            self._seen: set[str] = set()
            self._seen_until = 0
        self._check_prompts()
        self._text = self._text_table(self._loaded, texts)
        self._empty = self._place(
            self._tokenizer([""]) if self.pretraining else self._text.empty
        )
        self._texts = texts
        self._reward = assemble.make_reward(config, self._reward_context)
        self._lost = 0

    def _check_prompts(self) -> None:
        """Before hours of encoding: can the rewards score them, and what is to be told."""
        for key, prompts in (
            ("prompts", self._prompts),
            ("eval.prompts", self._eval_prompts),
        ):
            assemble.check_prompts(self.config, self._reward_context, prompts, key)
        tokenizer = self.model.tokenizer
        for line in prompt_checks.notes(tokenizer, self._prompts, self._eval_prompts):
            print(line, file=sys.stderr)

    def digests(self) -> dict[str, str]:
        """Of what the prompts say; the workdir keeps them, a file may be edited."""
        known = {"eval.prompts": prompt_data.digest(self._eval_prompts)}
        if not self.pretraining:
            known["prompts"] = prompt_data.digest(self._prompts)
        return known

    def initial_state(self) -> rl_update.TrainState:
        """The state before the first iteration, on the mesh."""
        specs = self.work.trainable_specs
        return self.work.initial_state(meshes.place(self._initial, specs, self.mesh))

    # -- one iteration -------------------------------------------------------------

    def step(
        self, state: rl_update.TrainState, iteration: int
    ) -> tuple[rl_update.TrainState, dict[str, Any]]:
        """Iteration `iteration`: (new state, metrics)."""
        if self.pretraining:
            return self._pretraining_step(state, iteration)
        return self._policy_step(state, iteration)

    def _policy_step(self, state, iteration):
        config, work = self.config, self.work
        begin = time.monotonic()
        prompts = prompt_data.batch(
            self._prompts, config.seed, iteration, config.prompts_per_iteration
        )
        text = self._place(self._rows(prompts, iteration))
        key = meshes.random_key(self.mesh, config.seed, iteration)
        jobs = work.planner.jobs(iteration)
        packed = work.planner.pack(jobs)
        leaves = credit.leaves_of(jobs, config.train.advantage_key)
        variables = overlay(self._frozen, work.sampling_part(state))

        def start(tables):
            tables = self._place(tables, programs.PACKS)
            made = work.rollout(variables, key, tables, text, self._empty)
            return made, work.decode(decoding(self._frozen), made.clean)

        def score(images, first):
            _check_finite(config, iteration, {"images": images})
            numbers = leaves.prompt[first : first + len(images)]
            return self._reward.start(images, [prompts[k] for k in numbers])

        batches = packing.split(packed, config.reward_batches, self.mesh.size)
        made, images, scores = overlap.sample(batches, start, work.join, score)
        sampled = time.monotonic()
        self.check()
        measured, leaves, failed = self._finish_rewards(scores, leaves)
        if failed.get("reward_failed") == 1.0:
            return state, failed
        entries, stats = work.entries(jobs, packed, leaves, measured)
        scored = time.monotonic()

        self.check()  # for the last time: the update takes the state's memory
        state, info = work.update(
            state,
            self._frozen,
            work.pool(made),
            self._place(entries, programs.SPLIT),
            key,
            text,
            self._empty,
        )
        metrics = {
            f"reward_{name}": float(np.mean(values[leaves.own]))
            for name, values in measured.items()
        }
        metrics |= failed | stats | self._count_prompts(iteration)
        metrics |= _count_work(config, jax.device_get((made.evaluations, made.rounds)))
        metrics["decoded_images"] = len(images)
        metrics["nfe_update"] = int(entries.weight.any(axis=-1).sum())
        metrics["actual_batch_size"] = int(np.count_nonzero(entries.weight))
        learned = _flatten(jax.device_get(info), entries.weight)
        _check_finite(config, iteration, learned)
        metrics |= learned
        seconds = time.monotonic() - begin
        return state, metrics | {
            "time/rollout": sampled - begin,
            "time/reward": scored - sampled,
            "time/update": time.monotonic() - scored,
            "time/images_per_second": self.images_per_iteration / seconds,
        }

    def _finish_rewards(self, scores, leaves):
        """The rewards, the leaves that have them, and what share of prompts has not."""
        skip = self.config.reward_failure == "skip"
        measured = self._reward.finish(scores, skip)
        leaves = credit.scored(leaves, measured["avg"])
        if not skip:
            return measured, leaves, {}
        failed = 1.0 - len(set(leaves.prompt[leaves.own])) / len(set(leaves.prompt))
        self._lost = self._lost + 1 if failed == 1.0 else 0
        if self._lost == MOST_LOST:
            raise RewardFailure(
                f"reward_failure: skip: {MOST_LOST} iterations in a row had no rewards"
            )
        return measured, leaves, {"reward_failed": failed}

    def _pretraining_step(self, state, iteration):
        config, begin = self.config, time.monotonic()
        size = config.prompts_per_iteration
        captions, scenes = self._scenes.batch(iteration, size)
        numbers, entries = credit.scene_entries(
            np.arange(size), config.microbatch, self.mesh.size
        )
        state, info = self.work.update(
            state,
            self._frozen,
            self.work.encode(self._place(scenes), self._place(numbers, programs.PACKS)),
            self._place(entries, programs.SPLIT),
            meshes.random_key(self.mesh, config.seed, iteration),
            self._place(self._tokenizer(captions)),
            self._empty,
        )
        metrics = _flatten(jax.device_get(info), entries.weight)
        _check_finite(config, iteration, metrics)
        metrics["loss"] = metrics["flow_matching_loss"]
        seconds = time.monotonic() - begin
        return state, metrics | {"time/images_per_second": size / seconds}

    def _count_prompts(self, iteration: int) -> dict[str, int]:
        """How many different prompts the run has trained on: recounted on resume."""
        config = self.config
        for earlier in range(self._seen_until, iteration + 1):
            drawn = prompt_data.batch(
                self._prompts, config.seed, earlier, config.prompts_per_iteration
            )
            self._seen.update(prompt.text for prompt in drawn)
        self._seen_until = iteration + 1
        return {"trained_prompt_num": len(self._seen)}

    # -- evaluation ----------------------------------------------------------------

    def evaluate(self, state: rl_update.TrainState, final: bool) -> dict[str, float]:
        """Scores of the EMA (or the learner) on the held-out prompts."""
        return self._evaluator(self._variables(state), final)

    def evaluation_size(self, final: bool) -> int:
        """How many images an evaluation makes of every kind (guided, unguided ...)."""
        return len(self._evaluator.chosen(final)[0])

    def keep_base(self, workdir: Path) -> None:
        """Note what the run begins with; UserError if it began with other weights."""
        base_weights.keep(workdir, self.config, self._loaded)

    def warn_if_unmoved(self, state: rl_update.TrainState) -> None:
        """A line where the result of the run is the base model."""
        weights = "ema" if self.config.train.ema else "learner"
        part = state.ema if self.config.train.ema else state.trainable
        if not base_weights.differs(part, self._loaded):
            told = base_weights.unmoved(weights, self.config.num_iterations)
            print(f"warning: {told}", file=sys.stderr)

    def save(self, state: rl_update.TrainState, path: Path) -> None:
        """Write the variables that were evaluated: the result of the run."""
        assemble.save_result(path, self.model, self._variables(state))

    def sample_sheet(self, state: rl_update.TrainState) -> np.ndarray:
        """The contact sheet: some held-out prompts of every task, fixed noise."""
        tasks = {prompt.metadata.get("tag", "") for prompt in self._eval_prompts}
        prompt, member = evaluator.evaluation_set(
            self._eval_prompts, max(1, SAMPLES // len(tasks)), every_prompt=False
        )
        return self._evaluator.images(
            self._variables(state), prompt[:SAMPLES], member[:SAMPLES]
        )

    def _variables(self, state: rl_update.TrainState) -> Variables:
        chosen = state.ema if self.config.train.ema else state.trainable
        variables = overlay(self._frozen, chosen)
        if self.pretraining:  # the encoder moves, so its table does too
            self._evaluator.set_text(
                self._text_table(jax.device_get(variables), self._texts)
            )
        return variables

    # -- small things --------------------------------------------------------------

    def _tokenizer(self, texts: list[str]) -> np.ndarray:
        assert self.model.tokenizer is not None  # pretraining is of the embedded model
        return self.model.tokenizer(texts)

    def _text_table(self, variables: Variables, texts: list[str]) -> TextTable:
        return assemble.make_text_table(self.config, self.model, variables, texts)

    def _first_texts(self) -> list[str]:
        """The prompts to embed before the first iteration: all in a table in memory."""
        if self.model.prompts is None:
            return [prompt.text for prompt in self._prompts]
        told = budget.text_line(
            self.config, self.model, self._prompts, self._eval_prompts
        )
        print(f"text: {told}", flush=True)
        return self._coming_texts(0)

    def _coming_texts(self, iteration: int) -> list[str]:
        size, last = self.config.prompts_per_iteration, self.config.num_iterations
        seed = self.config.seed
        return text_table.coming(self._prompts, seed, iteration, size, last)

    def _rows(self, prompts: list[Prompt], iteration: int) -> TextEmbedding:
        """The embeddings of an iteration's prompts; of the next ones too, if need be."""
        texts = [prompt.text for prompt in prompts]
        if self._text.lacks(texts):
            self._text.add(self._coming_texts(iteration), self.check)
        return self._text.rows(texts)

    def _place(self, tree: Any, spec: Any = programs.WHOLE) -> Any:
        return meshes.place(tree, spec, self.mesh)


def _count_work(config, counted) -> dict[str, float]:
    """Network evaluations of the rollout and how full its microbatches were."""
    evaluations, rounds = (float(np.sum(values)) for values in counted)
    return {
        "nfe_rollout": evaluations,
        "nfe_occupancy": evaluations / (rounds * config.microbatch),
    }


def _flatten(info: dict[str, np.ndarray], weight: np.ndarray) -> dict[str, float]:
    """Means over the updates of an iteration; a gap is that of the first one.

    `weight` [update, ...] is that of the entries. An update without any has learned
    nothing and measured nothing: it does not count, and if none has any, only the gaps
    are told.
    """
    learned = np.asarray(weight).reshape(len(weight), -1).any(axis=1)
    metrics = {}
    for name, values in info.items():
        if name.endswith("_gap"):
            metrics[name] = float(values[0])
        elif learned.any():
            metrics[name] = float(np.mean(values[learned]))
    return metrics


def _check_finite(config, iteration: int, values: Mapping[str, Any]) -> None:
    """UserError for a run that has diverged, before a checkpoint holds it."""
    for name, value in values.items():
        if not np.all(np.isfinite(value)):
            raise UserError(
                f"train.learning_rate: {config.train.learning_rate}: {name} not "
                f"finite at iteration {iteration}: take a lower one and another "
                "--workdir; the checkpoints before are intact"
            )
