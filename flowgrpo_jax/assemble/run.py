"""What one run consists of: model, data, rewards, a step, and an evaluator."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from flowgrpo_jax.assemble import base_weights, prompt_checks, sizes, specs
from flowgrpo_jax.assemble.model import (
    save_result,
    starting_model,
    trainable_part,
    warm_start,
)
from flowgrpo_jax.assemble.prompts import check_prompts, judges, load_prompt_set
from flowgrpo_jax.assemble.rewards import (
    make_eval_reward,
    make_monitor,
    make_reward,
    reward_context,
)
from flowgrpo_jax.assemble.text import make_text_table
from flowgrpo_jax.assemble.work import make_work, make_works, pretrains
from flowgrpo_jax.cost import budget
from flowgrpo_jax.data import buckets
from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine.collected import Collected
from flowgrpo_jax.engine.policy import PolicyStep, coming_texts
from flowgrpo_jax.engine.pretraining import PretrainingStep
from flowgrpo_jax.engine.workload import PretrainingWork, Work, for_devices
from flowgrpo_jax.inference.evaluator import Evaluation, Evaluator
from flowgrpo_jax.models.flow_model import Variables, overlay
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rl.update import TrainState
from flowgrpo_jax.runtime import cluster
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.resolution import Size
from flowgrpo_jax.runtime.samples import Sample
from flowgrpo_jax.worlds.registry import WORLDS


class Run:
    """Model, data, rewards, step and evaluator of one run.

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
        self._reward_context = rewards or reward_context(config)
        self.mesh = meshes.make_mesh(specs.mesh_shape(config))
        self._load_prompts()
        asked = self._sizes()
        model, self._loaded = starting_model(config, self.mesh, asked)
        self.model = for_devices(model, self.mesh, config.remat)
        self._models = sizes.models(config, self.model, asked)
        self._buckets = buckets.by_size(self._prompts, self.model.size)
        self._works = make_works(
            config,
            self.mesh,
            {size: self._models[size] for size in self._buckets},
            self._loaded,
        )
        self.work = self._main_work()
        trainable = trainable_part(config, self.model, self._loaded)
        self._initial = warm_start(config, self.model, trainable)
        frozen = self.work.frozen_part(self._loaded, self._initial)
        self._frozen = meshes.place(frozen, self.work.frozen_specs, self.mesh)
        self._set_up_prompts()
        self._text = self._text_table(self._loaded)
        self._step = self._make_step()
        self.images_per_iteration = self._step.images_per_iteration
        judge = make_eval_reward(config, self._reward_context)
        judge.check = self._check
        self._evaluator = Evaluator(
            specs.eval_spec(config, *self._models.values()),
            self.mesh,
            self.work.variables_specs,
            self._eval_prompts,
            self._text,
            judge,
            make_monitor(config, self._reward_context),
            check=self._check,
        )

    def _check(self) -> None:
        self.check()

    def _load_prompts(self) -> None:
        config = self.config
        self._eval_prompts = load_prompt_set(
            config.eval.prompts, "test", "eval.prompts"
        )
        self._prompts: list[Prompt] = []
        if not pretrains(config):
            self._prompts = load_prompt_set(config.prompts, "train")

    def _sizes(self) -> list[Size]:
        """The sizes that prompts ask for, of training and held out."""
        config = self.config
        found = set(sizes.asked(config, self._prompts, "prompts", config.prompts))
        key, source = "eval.prompts", config.eval.prompts
        return sorted(found | {*sizes.asked(config, self._eval_prompts, key, source)})

    def _main_work(self) -> Work:
        """What tells the memory that is needed: of a policy's sizes, the largest one."""
        if not self._works:
            return make_work(self.config, self.mesh, self.model, self._loaded)
        return max(self._works.values(), key=lambda work: work.model.image_tokens)

    def _set_up_prompts(self) -> None:
        config = self.config
        self._texts = [prompt.text for prompt in self._eval_prompts]
        if self._prompts:
            self._texts += self._first_texts()
        for line in sizes.lines(self._buckets, config.prompts_per_iteration):
            print(line, flush=True)
        # Before hours of encoding: can the rewards score them, and what is to be told.
        told = prompt_checks.notes(
            self.model.tokenizer, self._prompts, self._eval_prompts
        )
        for key, prompts in (
            ("prompts", self._prompts),
            ("eval.prompts", self._eval_prompts),
        ):
            check_prompts(config, self._reward_context, prompts, key)
            told += prompt_checks.cut(
                self.model.prompts,
                judges(config, key),
                self._reward_context,
                [prompt.text for prompt in prompts],
                key,
            )
        for line in told:
            print(line, file=sys.stderr)

    def _first_texts(self) -> list[str]:
        """The prompts to embed before the first iteration: all in a table in memory."""
        if self.model.prompts is None:
            return [prompt.text for prompt in self._prompts]
        spec, folder = specs.policy_spec(self.config), self.config.embedding_cache
        told = budget.text_line(
            spec, self.model, self._prompts, self._eval_prompts, folder
        )
        print(f"text: {told}", flush=True)
        return coming_texts(spec, self._buckets, 0)

    def _make_step(self) -> PolicyStep | PretrainingStep:
        config, work = self.config, self.work
        if isinstance(work, PretrainingWork):
            scenes = WORLDS[self.model.name].stream(
                config.seed,
                config.train.caption_noise.to_dict(),
                config.train.clean_iterations,
                config.train.caption_dropout,
            )
            return PretrainingStep(work, self._frozen, scenes, config.seed)
        reward = make_reward(config, self._reward_context)
        reward.check = self._check
        return PolicyStep(
            specs.policy_spec(config),
            self._works,
            self._frozen,
            self._buckets,
            self._text,
            reward,
            self._check,
        )

    def digests(self) -> dict[str, str]:
        """Of what the prompts say; the workdir keeps them, a file may be edited."""
        known = {"eval.prompts": prompt_data.digest(self._eval_prompts)}
        if self._prompts:
            known["prompts"] = prompt_data.digest(self._prompts)
        return known

    # -- training ------------------------------------------------------------------

    def initial_state(self) -> TrainState:
        """The state before the first iteration, on the mesh."""
        part = meshes.place(self._initial, self.work.trainable_specs, self.mesh)
        return self.work.initial_state(part)

    def forget_base(self) -> None:
        """Let go of what the run began with, once the state is there.

        Of what learns whole it would be a copy in fp32 beside the state's own two.
        """
        adapted = "lora" in self._initial  # and the base model has no adapter
        self._began = (
            base_weights.UNADAPTED if adapted else base_weights.mark(self._initial)
        )
        del self._loaded, self._initial

    def step(
        self, state: TrainState, iteration: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Iteration `iteration`: (new state, metrics)."""
        return self._step.step(state, iteration)

    def collect(self, state: TrainState, iteration: int) -> Collected:
        """The first part of `step` of a policy: what the iteration learns from."""
        assert isinstance(self._step, PolicyStep), "pretraining has no rollout"
        return self._step.collect(state, iteration)

    def learn(
        self, state: TrainState, got: Collected
    ) -> tuple[TrainState, dict[str, Any]]:
        """The second part: (new state, metrics). It takes the state's memory."""
        assert isinstance(self._step, PolicyStep), "pretraining has no rollout"
        return self._step.learn(state, got)

    # -- evaluation ----------------------------------------------------------------

    def evaluate(self, state: TrainState, final: bool) -> Evaluation:
        """The EMA (or the learner) on the held-out prompts: scores and some images."""
        return self._evaluator(self._variables(state), final)

    def evaluation_size(self, final: bool) -> int:
        """How many images an evaluation makes of every kind (guided, unguided ...)."""
        return len(self._evaluator.chosen(final)[0])

    def latest_groups(self) -> Sequence[Sample]:
        """Best and worst images of some groups of the last iteration, if any."""
        return self._step.latest_groups

    def _variables(self, state: TrainState) -> Variables:
        variables = overlay(self._frozen, self._evaluated(state))
        if self._step.moves_text:  # so its table moves too
            self._evaluator.set_text(self._text_table(meshes.to_host(variables)))
        return variables

    def _evaluated(self, state: TrainState) -> Variables:
        """The trainable variables that are evaluated and left as the result."""
        return state.ema if self.config.train.ema else state.trainable

    def _text_table(self, variables: Variables):
        return make_text_table(self.config, self.model, variables, self._texts)

    # -- what it began with, and what it leaves ---------------------------------------

    def keep_base(self, workdir: Path) -> None:
        """Note what the run begins with; UserError if it began with other weights."""
        base_weights.keep(workdir, self.config, self._loaded)

    def check_base(self, workdir: Path) -> None:
        """UserError if the run in `workdir` began with other weights; writes nothing."""
        base_weights.check(workdir, self.config, self._loaded)

    def warn_if_unmoved(self, state: TrainState) -> None:
        """A line where the result of the run is the base model."""
        weights = "ema" if self.config.train.ema else "learner"
        if base_weights.mark(self._evaluated(state)) == self._began:
            told = base_weights.unmoved(weights, self.config.num_iterations)
            print(f"warning: {told}", file=sys.stderr)

    def save(self, state: TrainState, path: Path) -> None:
        """Write the variables that were evaluated: the result of the run."""
        variables, first = self._variables(state), cluster.is_first()
        if cluster.count() > 1:  # else leaf by leaf, as they are written
            variables = meshes.to_host(variables, keep=first)
        if first:
            save_result(path, self.model, variables)
