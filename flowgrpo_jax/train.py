"""One run, top to bottom: set up, resume, then iterate.

A checkpoint at iteration i holds all that iterations before i made; the evaluation at
i belongs to the run that goes on from it. So a killed run that is started again
writes the rows that an undisturbed one writes.
"""

import functools
import signal
import sys
import time
import types
from pathlib import Path

import jax
import ml_collections
import numpy as np

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import base_weights
from flowgrpo_jax.assemble.run import Run
from flowgrpo_jax.config import checks
from flowgrpo_jax.cost import budget
from flowgrpo_jax.inference import evaluator
from flowgrpo_jax.report import hacking, page
from flowgrpo_jax.report.live import LivePage
from flowgrpo_jax.rewards.scoring import RewardFailure
from flowgrpo_jax.runtime import cluster, environment, metric_names
from flowgrpo_jax.runtime import images as grids
from flowgrpo_jax.runtime import samples as pictures
from flowgrpo_jax.runtime.checkpoint import Checkpointer, Schedule
from flowgrpo_jax.runtime.metrics import (
    MetricWriter,
    Unwritten,
    peak_memory_gb,
    read_metrics,
)
from flowgrpo_jax.runtime.process_log import ProcessLog
from flowgrpo_jax.runtime.progress import Progress
from flowgrpo_jax.runtime.shared_workdir import open_on_all
from flowgrpo_jax.runtime.stopping import GracefulStop, Stopped
from flowgrpo_jax.runtime.workdir import Workdir, finished_line


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, command: str = ""
) -> bool:
    """Run to `num_iterations` (True), or until asked to stop by a signal (False).

    Starts from the newest checkpoint of `workdir` if there is one. `command` is the
    line that started it, if one did: the report shows it. UserError for a config that
    cannot run or a workdir that cannot be used.
    """
    checks.check(config)
    for line in checks.remarks(config):
        print(f"warning: {line}", file=sys.stderr)
    config = base_weights.moved(config, workdir)
    held, may_differ = config.to_dict(), configs.MAY_DIFFER
    cluster.same({"config": held})
    with ProcessLog() as log:
        print(f"loading {config.model}", flush=True)
        # Before the workdir: a run that cannot be leaves none behind.
        run = Run(config, assemble.try_rewards(config))
        plan = budget.summary(run.work, jax.devices()[0].device_kind)
        print(*plan, sep="\n", flush=True)
        cluster.same({"prompts": run.digests(), "environment": environment.of_hosts()})
        with (
            open_on_all(workdir, held, may_differ, run.digests()) as place,
            GracefulStop() as stop,
        ):
            log.to(place.path)
            return _train(run, place, stop, command)


def _train(run: Run, place: Workdir, stop: GracefulStop, command: str) -> bool:
    """The run in its workdir; see `train`."""
    config = run.config
    run.check = stop.check
    stop.unsaved = False  # until an iteration is done
    run.keep_base(place.path)
    if line := finished_line(place.path, config.num_iterations):
        print(line, flush=True)
    with Checkpointer(place.checkpoints, config.checkpoint.keep) as checkpoints:
        start = checkpoints.latest() or 0
        shape = dict(run.mesh.shape)
        if line := cluster.first(lambda: environment.record(place.path, start, shape)):
            print(line, flush=True)
        state = run.initial_state()
        run.forget_base()
        if start:
            state = checkpoints.restore(state, start)
        with (
            _writer(place.path, start, config, command) as writer,
            Progress(config.num_iterations, start, _pauses(config)) as progress,
            jax.transfer_guard("disallow"),
        ):
            if start or writer.rewritten:
                progress.message(_going_on(start, writer.rewritten))
            state, finished = _loop(
                run, state, start, checkpoints, writer, stop, progress, place
            )
    stop.unsaved = False  # all is in the checkpoint: what follows is made of it
    finished = finished and not any(cluster.together(lambda: stop.requested))
    if finished:
        run.save(state, place.path)
    cluster.first(lambda: _report(place.path, finished))
    if finished:
        run.warn_if_unmoved(state)
    return finished


def _writer(
    workdir: Path, start: int, config, command: str
) -> MetricWriter | Unwritten:
    """Rows of this run, of which the first process writes all."""
    if not cluster.is_first():
        return Unwritten()
    wandb = {"project": config.log.wandb} if config.log.wandb else None
    return MetricWriter(
        workdir,
        start,
        config.log.tensorboard,
        wandb,
        config.to_dict(),
        [LivePage(workdir, command)],
    )


def _going_on(start: int, rewritten: int) -> str:
    again = f": rows from there on are written again ({rewritten})"
    return f"going on from iteration {start}" + (again if rewritten else "")


def _pauses(config) -> frozenset[int]:
    """The iterations that begin with an evaluation."""
    last, every = config.num_iterations, config.eval.every
    return frozenset({0, last, *range(0, last, every or last or 1)})


def _loop(run, state, start, checkpoints, writer, stop, progress, place):
    config = run.config
    last, pauses = config.num_iterations, _pauses(config)
    schedule = Schedule(config.checkpoint.every, config.checkpoint.minutes)
    for iteration in range(start, last + 1):
        # -- checkpoint ------------------------------------------------------------
        due = cluster.first(functools.partial(schedule.due, iteration))
        if iteration > start and (due or iteration == last):
            writer.flush()
            checkpoints.save(iteration, state)

        try:
            # -- evaluation --------------------------------------------------------
            cluster.together(stop.check)
            if iteration in pauses:
                final = iteration in (0, last)
                _evaluate(run, state, iteration, final, writer, progress, place)
            if iteration == last:
                return state, True

            # -- one iteration -----------------------------------------------------
            cluster.together(stop.check)
            if iteration == start:
                progress.message("compiling the rollout and the update")
            state, metrics = run.step(state, iteration)
            stop.unsaved = True
        except (Stopped, RewardFailure) as why:  # the state is as it was
            if isinstance(why, Stopped):  # this process, or another one of the run
                stop.requested = stop.requested or signal.SIGTERM
            writer.flush()
            checkpoints.save(iteration, state)
            if not stop.requested:  # which also ends a reward's workers, on a Ctrl-C
                raise RewardFailure(
                    f"{why}: the run is saved at iteration {iteration}, and the same "
                    "command goes on from there"
                ) from why
            progress.message(
                f"stopped at iteration {iteration}; the same command goes on from here"
            )
            return state, False
        if iteration % config.log.every == 0:
            writer.write(iteration, metrics)
        shown = metrics.get(metric_names.REWARD_AVERAGE, metrics.get("loss", np.nan))
        progress.update(iteration, shown, run.images_per_iteration)
    raise AssertionError("the loop ends at its last iteration")


def _evaluate(run, state, iteration, final, writer, progress, place) -> None:
    begin = time.monotonic()
    progress.message(f"evaluating {run.evaluation_size(final)} images")
    scores, samples, by_prompt = run.evaluate(state, final)
    seconds = {metric_names.EVALUATION: time.monotonic() - begin}
    if cluster.is_first():
        worse = _fallen(run, scores, place)
        scores[metric_names.MONITORS_WORSE] = len(worse)
        writer.write(iteration, scores | seconds, kind="eval")
        _show_samples(run, iteration, samples, by_prompt, writer, place)
        if worse:
            progress.message(hacking.warning(worse))
    progress.message(f"iteration {iteration}\n{evaluator.table(scores)}")
    progress.skip()


def _fallen(run, scores, place) -> dict[str, float]:
    """The monitors that are worse than at the first evaluation, by how much."""
    evals = [row for row in read_metrics(place.path) if row["kind"] == "eval"]
    return hacking.fallen(
        evals[0] if evals else scores,
        scores,
        run.config.reward.to_dict(),
        run.config.eval.monitor_threshold,
    )


def _report(workdir: Path, finished: bool) -> None:
    """Write report.html; tell a finished run's scores before and after."""
    path = page.write_report(workdir)
    if finished:
        scores = [row for row in read_metrics(workdir) if row["kind"] == "eval"]
        print(evaluator.table(scores[0], scores[-1]))
        print(f"peak memory {peak_memory_gb():.2f} GB; report: {path}")


def _show_samples(run, iteration, samples, by_prompt, writer, place) -> None:
    pictures.save(place.samples, pictures.name_of(iteration), samples, by_prompt)
    if groups := run.latest_groups():
        told = {"iteration": iteration - 1}
        pictures.save(place.samples, pictures.GROUPS, groups, columns=4, **told)
    rewards = run.config.eval.reward or run.config.reward
    captions = [one.caption([*rewards]) for one in samples[:16]]
    images = grids.on_one_canvas([one.image for one in samples[:16]])
    writer.images(iteration, {metric_names.monitor("images"): images}, captions)


class _Callable(types.ModuleType):
    """`flowgrpo_jax.train(config, workdir)` is the function of this file."""

    def __call__(
        self, config: ml_collections.ConfigDict, workdir: str | Path, command: str = ""
    ) -> bool:
        return train(config, workdir, command)


sys.modules[__name__].__class__ = _Callable
