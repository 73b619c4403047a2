"""One iteration of online reinforcement learning.

prompts(seed, i) -> embeddings -> rollout -> decode -> rewards -> advantages -> updates.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flowgrpo_jax.data import buckets
from flowgrpo_jax.data.buckets import Buckets
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit, extremes, overlap, programs, text_table
from flowgrpo_jax.engine.collected import Collected
from flowgrpo_jax.engine.finite import check_finite
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.flow import packing
from flowgrpo_jax.models.flow_model import Variables, decoding, overlay
from flowgrpo_jax.rewards.scoring import RewardFailure, Scorer
from flowgrpo_jax.rl import measurements
from flowgrpo_jax.rl.update import TrainState
from flowgrpo_jax.runtime import cluster, metric_names
from flowgrpo_jax.runtime import mesh as meshes
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
        return self.learn(state, self.collect(state, iteration))

    def collect(self, state: TrainState, iteration: int) -> Collected:
        """Sample and rate what iteration `iteration` learns from; `state` stays."""
        spec = self.spec
        begin, skip = time.monotonic(), spec.skip_failures
        size, prompts = self._batch(iteration)
        work = self.works[size]
        texts = [prompt.text for prompt in prompts]
        cluster.together(lambda: self._embed(texts, iteration))
        text = work.place(self._text.rows(texts))
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

        arrived: list[np.ndarray] = []  # images that this process holds

        def score(images, numbers):
            arrived.append(images)
            judged = [prompts[k] for k in leaves.prompt[numbers]]
            return self._reward.start(images, judged)

        parts = work.planner.spec.reward_batches
        pieces = packing.split(packed, parts, work.mesh.size)
        made: Any = None

        def here():
            nonlocal made
            # All of it first, whatever fails: the devices of all processes do it together.
            made, scores = overlap.sample(pieces, start, work.join, score)
            sampled = time.monotonic()
            sums = [images.sum() for images in arrived]  # no copies, as of a joined one
            check_finite(learning_rate, iteration, {"images": sums})
            self._check()
            batches = [batch for _, batch in scores]
            measured = self._reward.finish(batches, skip) if batches else {}
            self._check()  # for the last time: the update takes the state's memory
            return {
                "numbers": [numbers for numbers, _ in scores],
                "measured": measured,
                "evaluations": meshes.own_rows(made.evaluations)[1],
                "rounds": meshes.own_rows(made.rounds)[1],
                "rollout": sampled - begin,
                "seconds": time.monotonic() - begin,
            }

        told = cluster.together(here)
        own = told[cluster.index()]
        measured = credit.joined(told, len(leaves.prompt))
        leaves, failed = self._without_failed(leaves, measured)
        got = Collected(
            iteration=iteration,
            work=work,
            prompts=prompts,
            jobs=jobs,
            packed=packed,
            leaves=leaves,
            measured=measured,
            made=made,
            images=arrived,
            numbers=own["numbers"],
            variables=variables,
            key=key,
            text=text,
            empty=self._empty,
        )
        if failed.get("reward_failed") == 1.0:
            return got._replace(metrics=failed)
        update_batch, stats = work.update_batch(jobs, packed, leaves, measured)
        if arrived:
            self.latest_groups = extremes.best_and_worst(
                work.advantage,
                np.concatenate(arrived),
                np.concatenate(own["numbers"]),
                prompts,
                leaves,
                measured,
            )
        metrics = {
            metric_names.reward(name): float(np.mean(values[leaves.own]))
            for name, values in measured.items()
        }
        metrics |= failed | stats | self._count_prompts(iteration)
        if len(self.works) > 1:
            metrics |= {"height": size.height, "width": size.width}
        metrics |= _count_work(told, work.learner.microbatch)
        metrics["decoded_images"] = len(leaves.prompt)
        metrics["nfe_update"] = int(update_batch.weight.any(axis=-1).sum())
        metrics["actual_batch_size"] = int(np.count_nonzero(update_batch.weight))
        seconds = {
            metric_names.ROLLOUT: own["rollout"],
            metric_names.REWARD: time.monotonic() - begin - own["rollout"],
        }
        return got._replace(
            update_batch=update_batch,
            metrics=metrics,
            seconds=seconds | _seconds_of_hosts(told),
        )

    def learn(
        self, state: TrainState, got: Collected
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take the update's steps: (new state, metrics of the iteration).

        The state's memory is taken. Where no prompt has a reward, it is as it was.
        """
        if got.update_batch is None:
            return state, dict(got.metrics)
        begin, work = time.monotonic(), got.work
        state, info = work.update(
            state,
            self._frozen,
            work.experience(got.made),
            work.place(got.update_batch, programs.SPLIT),
            got.key,
            got.text,
            got.empty,
        )
        learned = measurements.of_iteration(
            jax.device_get(info), got.update_batch.weight
        )
        check_finite(work.learner.optimizer.learning_rate, got.iteration, learned)
        update = time.monotonic() - begin
        before = got.seconds[metric_names.ROLLOUT] + got.seconds[metric_names.REWARD]
        speed = self.images_per_iteration / (before + update)
        return state, {
            **got.metrics,
            **learned,
            **got.seconds,
            metric_names.UPDATE: update,
            metric_names.IMAGES_PER_SECOND: speed,
        }

    def _without_failed(self, leaves, measured):
        """The leaves that have rewards, and what share of prompts has not."""
        leaves = credit.scored(leaves, measured["avg"])
        if not self.spec.skip_failures:
            return leaves, {}
        failed = 1.0 - len(set(leaves.prompt[leaves.own])) / len(set(leaves.prompt))
        self._lost = self._lost + 1 if failed == 1.0 else 0
        if self._lost == MOST_LOST:
            raise RewardFailure(
                f"reward_failure: skip: {MOST_LOST} iterations in a row had no rewards"
            )
        return leaves, {"reward_failed": failed}

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

    def _embed(self, texts: list[str], iteration: int) -> None:
        """Embed an iteration's prompts, and the next ones too, where any is missing."""
        if self._text.lacks(texts):
            self._text.add(
                coming_texts(self.spec, self._prompts, iteration), self._check
            )


def _count_work(told: Sequence[Mapping], microbatch: int) -> dict[str, float]:
    """Evaluations of the network in the rollout, and how full microbatches were."""
    evaluations, rounds = (
        float(np.sum([np.sum(one[name]) for one in told]))
        for name in ("evaluations", "rounds")
    )
    return {
        "nfe_rollout": evaluations,
        "nfe_occupancy": evaluations / (rounds * microbatch),
    }


def _seconds_of_hosts(told: Sequence[Mapping]) -> dict[str, float]:
    """What every process took until its images had rewards: who waits for whom."""
    if len(told) == 1:
        return {}
    return {metric_names.host(k): one["seconds"] for k, one in enumerate(told)}


def coming_texts(spec: PolicySpec, prompts: Buckets, iteration: int) -> list[str]:
    """The prompts to embed at one time: those of the iterations from this one on."""
    size, last = spec.prompts_per_iteration, spec.num_iterations
    return text_table.coming(prompts, spec.seed, iteration, size, last)
