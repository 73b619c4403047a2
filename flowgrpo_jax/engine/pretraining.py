"""One iteration of pretraining: captioned scenes, painted, and flow matching on them."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flowgrpo_jax.engine import credit, programs
from flowgrpo_jax.engine.finite import check_finite
from flowgrpo_jax.engine.workload import PretrainingWork
from flowgrpo_jax.models.flow_model import Variables
from flowgrpo_jax.rl import measurements
from flowgrpo_jax.rl.update import TrainState
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.runtime.samples import Sample
from flowgrpo_jax.worlds.registry import Stream


class PretrainingStep:
    """Iterations of a model, its text encoder included, on a stream of scenes."""

    moves_text = True  # what embeds prompts learns too
    latest_groups: Sequence[Sample] = ()  # there is no rollout

    def __init__(
        self, work: PretrainingWork, frozen: Variables, scenes: Stream, seed: int
    ):
        self.work, self._frozen, self._scenes, self._seed = work, frozen, scenes, seed
        self._empty = work.place(self._tokens([""]))
        self.images_per_iteration = work.scenes_per_iteration

    def step(
        self, state: TrainState, iteration: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Iteration `iteration`: (new state, metrics)."""
        work, begin = self.work, time.monotonic()
        size = work.scenes_per_iteration
        captions, scenes = self._scenes.batch(iteration, size)
        numbers, update_batch = credit.batch_of_scenes(
            np.arange(size),
            work.learner.microbatch,
            work.mesh.size,
            work.learner.exact,
        )
        state, info = work.update(
            state,
            self._frozen,
            work.encode(work.place(scenes), work.place(numbers, programs.PACKS)),
            work.place(update_batch, programs.SPLIT),
            meshes.random_key(work.mesh, self._seed, iteration),
            work.place(self._tokens(captions)),
            self._empty,
        )
        metrics = measurements.of_iteration(jax.device_get(info), update_batch.weight)
        check_finite(work.learner.optimizer.learning_rate, iteration, metrics)
        metrics["loss"] = metrics["flow_matching_loss"]
        seconds = time.monotonic() - begin
        return state, metrics | {metric_names.IMAGES_PER_SECOND: size / seconds}

    def _tokens(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer = self.work.model.tokenizer
        assert tokenizer is not None  # only models of embedded worlds are pretrained
        return tokenizer(texts)
