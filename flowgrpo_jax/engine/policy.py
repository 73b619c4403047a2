"""One iteration of online reinforcement learning.

prompts(seed, i) -> embeddings -> rollout -> decode -> rewards -> advantages -> updates.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flowgrpo_jax.data import buckets
from flowgrpo_jax.data.buckets import Buckets
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit, extremes, overlap, programs, text_table
from flowgrpo_jax.engine.finite import check_finite
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.flow import packing
from flowgrpo_jax.models.flow_model import Variables, decoding, overlay
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.rewards.scoring import RewardFailure, Scorer
from flowgrpo_jax.rl import measurements
from flowgrpo_jax.rl.update import TrainState
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.runtime.resolution import Size
from flowgrpo_jax.runtime.samples import Sample

MOST_LOST = 3  # iterations in a row without any reward, where failures are skipped


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """How a run goes through its prompts, and what it does where rewards fail."""

    seed: int
    prompts_per_iteration: int
    num_iterations: int
    skip_failures: bool = False


class PolicyStep:
    """Iterations of a policy on its prompts, each of them of one size of picture.

    `check` is called wherever a step may be given up: what it raises comes out, and the
    state is as it was.
    """

    moves_text = False  # whether what embeds prompts learns too

    def __init__(
        self,
        spec: PolicySpec,
        works: Mapping[Size, PolicyWork],
        frozen: Variables,
        prompts: Buckets,
        text: TextTable,
        reward: Scorer,
        check: Callable[[], None],
    ):
        """`works`: what is compiled for the prompts of every size.

        `frozen`, placed, is what does not move; `text` may lack coming prompts.
        """
        self.spec, self.works, self._frozen = spec, works, frozen
        self._prompts, self._text, self._reward = prompts, text, reward
        self._check = check
        work = next(iter(works.values()))  # they plan and place alike
        self._empty = work.place(text.empty)
        self.latest_groups: list[Sample] = []  # some of the last iteration
        self._lost = 0
        self._seen: set[str] = set()
        self._seen_until = 0
        self.images_per_iteration = spec.prompts_per_iteration * len(
            work.planner.kinds[0].leaves
        )

    def step(
        self, state: TrainState, iteration: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Iteration `iteration`: (new state, metrics)."""
        spec = self.spec
        begin = time.monotonic()
        size, prompts = self._batch(iteration)
        work = self.works[size]
        text = work.place(self._rows(prompts, iteration))
        key = meshes.random_key(work.mesh, spec.seed, iteration)
        jobs = work.planner.jobs(iteration)
        packed = work.planner.pack(jobs)
        leaves = work.leaves(jobs)
        variables = overlay(self._frozen, work.sampling_part(state))
        learning_rate = work.learner.optimizer.learning_rate

        def start(tables):
            tables = work.place(tables, programs.PACKS)
            made = work.rollout(variables, key, tables, text, self._empty)
            return made, work.decode(decoding(self._frozen), made.clean)

        def score(images, first):
            check_finite(learning_rate, iteration, {"images": images})
            numbers = leaves.prompt[first : first + len(images)]
            return self._reward.start(images, [prompts[k] for k in numbers])

        parts = work.planner.spec.reward_batches
        batches = packing.split(packed, parts, work.mesh.size)
        made, images, scores = overlap.sample(batches, start, work.join, score)
        sampled = time.monotonic()
        self._check()
        measured, leaves, failed = self._finish_rewards(scores, leaves)
        if failed.get("reward_failed") == 1.0:
            return state, failed
        update_batch, stats = work.update_batch(jobs, packed, leaves, measured)
        self.latest_groups = extremes.best_and_worst(
            work.advantage, images, prompts, leaves, measured
        )
        scored = time.monotonic()

        self._check()  # for the last time: the update takes the state's memory
        state, info = work.update(
            state,
            self._frozen,
            work.experience(made),
            work.place(update_batch, programs.SPLIT),
            key,
            text,
            self._empty,
        )
        metrics = {
            metric_names.reward(name): float(np.mean(values[leaves.own]))
            for name, values in measured.items()
        }
        metrics |= failed | stats | self._count_prompts(iteration)
        if len(self.works) > 1:
            metrics |= {"height": size.height, "width": size.width}
        counted = jax.device_get((made.evaluations, made.rounds))
        metrics |= _count_work(counted, work.learner.microbatch)
        metrics["decoded_images"] = len(images)
        metrics["nfe_update"] = int(update_batch.weight.any(axis=-1).sum())
        metrics["actual_batch_size"] = int(np.count_nonzero(update_batch.weight))
        learned = measurements.of_iteration(jax.device_get(info), update_batch.weight)
        check_finite(learning_rate, iteration, learned)
        metrics |= learned
        seconds = time.monotonic() - begin
        return state, metrics | {
            metric_names.ROLLOUT: sampled - begin,
            metric_names.REWARD: scored - sampled,
            metric_names.UPDATE: time.monotonic() - scored,
            metric_names.IMAGES_PER_SECOND: self.images_per_iteration / seconds,
        }

    def _finish_rewards(self, scores, leaves):
        """The rewards, the leaves that have them, and what share of prompts has not."""
        skip = self.spec.skip_failures
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

    def _batch(self, iteration: int) -> tuple[Size, list[Prompt]]:
        """Size and prompts of an iteration: a pure function of (seed, iteration)."""
        count = self.spec.prompts_per_iteration
        return buckets.batch(self._prompts, self.spec.seed, iteration, count)

    def _count_prompts(self, iteration: int) -> dict[str, int]:
        """How many different prompts the run has trained on: recounted on resume."""
        for earlier in range(self._seen_until, iteration + 1):
            self._seen.update(prompt.text for prompt in self._batch(earlier)[1])
        self._seen_until = iteration + 1
        return {"trained_prompt_num": len(self._seen)}

    def _rows(self, prompts: list[Prompt], iteration: int) -> TextEmbedding:
        """The embeddings of an iteration's prompts; of the next ones too, if need be."""
        texts = [prompt.text for prompt in prompts]
        if self._text.lacks(texts):
            self._text.add(
                coming_texts(self.spec, self._prompts, iteration), self._check
            )
        return self._text.rows(texts)


def _count_work(counted, microbatch: int) -> dict[str, float]:
    """Evaluations of the network in the rollout, and how full microbatches were."""
    evaluations, rounds = (float(np.sum(values)) for values in counted)
    return {
        "nfe_rollout": evaluations,
        "nfe_occupancy": evaluations / (rounds * microbatch),
    }


def coming_texts(spec: PolicySpec, prompts: Buckets, iteration: int) -> list[str]:
    """The prompts to embed at one time: those of the iterations from this one on."""
    size, last = spec.prompts_per_iteration, spec.num_iterations
    return text_table.coming(prompts, spec.seed, iteration, size, last)
