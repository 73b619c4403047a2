"""A training sample of a run, made again: from a checkpoint before it, bit for bit.

The iterations between the checkpoint and the sample's own run again, by the functions
of the training loop, and their numbers are compared with the rows that the run wrote.
Nothing is written to its workdir.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flowgrpo_jax.assemble import restore
from flowgrpo_jax.assemble.rewards import try_rewards
from flowgrpo_jax.assemble.run import Run
from flowgrpo_jax.assemble.specs import mesh_shape, plan_spec
from flowgrpo_jax.assemble.work import pretrains
from flowgrpo_jax.config import checks
from flowgrpo_jax.engine import trajectory
from flowgrpo_jax.engine.planner import Planner
from flowgrpo_jax.engine.trajectory import Trajectory
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rl.update import TrainState
from flowgrpo_jax.runtime import environment, metric_names
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.checkpoint import Checkpointer
from flowgrpo_jax.runtime.metrics import number, read_metrics
from flowgrpo_jax.runtime.workdir import check_digests, checkpoint_steps, locate

Row = Mapping[str, Any]
Pair = tuple[float, float]


class Place(NamedTuple):
    """Which sample: numbers of iteration, prompt of the iteration, member of the group."""

    iteration: int
    prompt: int
    member: int


class Checked(NamedTuple):
    """An iteration's numbers beside the row that the run wrote of it, if it did.

    `differing`: name -> (here, in the run). `learned`: the same of what was learned
    after the sample on another mesh, and so says nothing of it. `equal` counts the
    others.
    """

    iteration: int
    equal: int
    differing: Mapping[str, Pair]
    learned: Mapping[str, Pair] = {}


class Replayed(NamedTuple):
    """A sample, the checkpoint that it was made from, and what was compared.

    `environments`: what is not as it was when the run made these iterations.
    """

    place: Place
    checkpoint: int
    sample: Trajectory
    checked: Sequence[Checked]
    environments: Sequence[str]

    @property
    def differs(self) -> bool:
        """Whether anything is known not to be the same bits as in the run."""
        return bool(self.sample.unequal) or any(one.differing for one in self.checked)


def replay(
    workdir: str | Path,
    place: Place,
    *,
    checkpoint: int | None = None,
    mesh: Mapping[str, int] | None = None,
    model: str | None = None,
    tell: Callable[[str], None] = print,
) -> Replayed:
    """Make a training sample of the run in `workdir` again.

    It goes on from the nearest `checkpoint` (finished iterations; 0 is the beginning,
    which needs none). `mesh` takes the place of the one that the run made that iteration
    on, and `model` says where its base model is now. The run may still be training.
    UserError for what is not there.
    """
    folder = locate(workdir)
    config = _config(folder, model)
    rows = {
        row["iteration"]: row for row in read_metrics(folder) if row["kind"] == "train"
    }
    start = _start(folder, config, place.iteration, checkpoint, rows)
    was_on = _mesh_of_run(folder, place.iteration)
    _choose_mesh(config, mesh or was_on)
    _check_place(config, place)
    told = _environments(folder, start, place.iteration)
    for line in told:
        tell(f"warning: {line}")
    run = Run(config, try_rewards(config))
    run.check_base(folder)
    check_digests(folder, {"prompts": run.digests()["prompts"]})
    state = _state(run, folder, start)
    between = place.iteration - start
    of = f"the checkpoint of iteration {start}" if start else "the beginning"
    tell(f"from {of}: {between} {_iterations(between)} to run again before it")
    checked = []
    for iteration in range(start, place.iteration):
        state, metrics = run.step(state, iteration)
        checked.append(_compared(iteration, metrics, rows.get(iteration)))
        tell(line_of(checked[-1]))
    got = run.collect(state, place.iteration)
    sample = trajectory.of(got, place.prompt, place.member)
    # Its own row tells of all that was sampled with it, and of what was learned from it.
    _, metrics = run.learn(state, got)
    own = _compared(place.iteration, metrics, rows.get(place.iteration))
    if dict(run.mesh.shape) != was_on:
        own = _apart(own, got.metrics)
    checked.append(own)
    tell(line_of(checked[-1]))
    return Replayed(place, start, sample, checked, told)


def line_of(checked: Checked) -> str:
    """What the comparison of an iteration came to."""
    name = f"iteration {checked.iteration}"
    total = checked.equal + len(checked.differing) + len(checked.learned)
    if not total:
        return f"{name}: the run wrote no row of it (log.every): nothing to compare"
    if checked.differing:
        count = f"{len(checked.differing)} of {total}"
        return f"{name}: DIFFERS in {count} numbers: {_gaps(checked.differing)}"
    if checked.learned:
        return (
            f"{name}: all {checked.equal} numbers of what was sampled are equal; what was "
            f"learned from it, on another mesh, differs: {_gaps(checked.learned)}"
        )
    return f"{name}: all {checked.equal} numbers of its row are equal"


def _gaps(differing: Mapping[str, Pair]) -> str:
    return "; ".join(
        f"{name} {here!r} here, {there!r} in the run"
        for name, (here, there) in differing.items()
    )


def _iterations(count: int) -> str:
    return "iteration" if count == 1 else "iterations"


def _config(folder: Path, model: str | None) -> ConfigDict:
    """The run's config, without what only evaluations need."""
    config = restore.choose_config(None, str(folder), model)
    if pretrains(config):
        raise UserError(
            f"--workdir: {folder}: holds a run of pretraining, which samples nothing: "
            "give that of a run that learns from rewards"
        )
    config.monitors = ()
    return config


def _mesh_of_run(folder: Path, iteration: int) -> dict[str, int] | None:
    """The mesh that an iteration was made on; None where the run did not keep it."""
    before = [
        entry
        for entry in environment.history(folder)
        if entry["from_iteration"] <= iteration
    ]
    return dict(before[-1]["mesh"]) if before and "mesh" in before[-1] else None


def _choose_mesh(config: ConfigDict, mesh: Mapping[str, int] | None) -> None:
    """Set the mesh; UserError if there are not as many devices here."""
    for axis, size in (mesh or {}).items():
        config.mesh[axis] = size
    checks.check(config)
    try:
        meshes.make_mesh(mesh_shape(config))
    except UserError as error:
        raise UserError(
            f"--mesh: {error}: give another one, such as --mesh=data=-1: samples are the "
            "same, updates add up in another order"
        ) from error


def _start(
    folder: Path,
    config: ConfigDict,
    iteration: int,
    asked: int | None,
    rows: Mapping[int, Row],
) -> int:
    """The checkpoint to go on from; UserError where there is none for the iteration.

    The beginning needs none, and is taken unasked where the run had no other one yet.
    """
    steps = checkpoint_steps(folder)
    done = max([0, *steps, *(row + 1 for row in rows)])
    if not done:
        raise UserError(f"--workdir: {folder}: the run has not done any iteration yet")
    if not 0 <= iteration < done:
        raise UserError(
            f"--iteration: {iteration}: the run has done {done}: must be one of 0 to "
            f"{done - 1}"
        )
    before = [step for step in steps if step <= iteration]
    if asked is not None:
        if asked and asked not in before:
            raise UserError(
                f"--checkpoint: {asked}: must be one at or before iteration {iteration}: "
                f"one of {', '.join(map(str, [0, *before]))} (0: the beginning)"
            )
        return asked
    if before or iteration < config.checkpoint.every:
        return max(before, default=0)
    kept = f"its first one is of iteration {steps[0]}" if steps else "it has none"
    others = f", or replay an iteration from {steps[0]} on" if steps else ""
    raise UserError(
        f"--iteration: {iteration}: no checkpoint of the run is from before it ({kept}): "
        f"give --checkpoint=0 to run the {iteration} before it again, from the beginning"
        f"{_by_rows(rows, iteration)}{others}; a larger checkpoint.keep keeps more"
    )


def _by_rows(rows: Mapping[int, Row], iteration: int) -> str:
    """How long so many iterations took the run."""
    taken = [
        sum(row.get(phase, 0.0) for phase in metric_names.PHASES)
        for row in rows.values()
    ]
    if not taken:
        return ""
    return f" (about {np.mean(taken) * iteration / 60:.1f} min, as the run took)"


def _check_place(config: ConfigDict, place: Place) -> None:
    """UserError for a prompt or a member that no iteration of the run has."""
    prompts = config.prompts_per_iteration
    if not 0 <= place.prompt < prompts:
        raise UserError(
            f"--prompt: {place.prompt}: an iteration has {prompts}: must be one of 0 to "
            f"{prompts - 1}"
        )
    devices = meshes.make_mesh(mesh_shape(config)).size
    made = Planner(plan_spec(config), devices).plan(place.iteration, place.prompt)
    images = len(trajectory.members(made))
    if not 0 <= place.member < images:
        raise UserError(
            f"--member: {place.member}: a prompt has {images} images: must be one of 0 "
            f"to {images - 1}"
        )


def _environments(folder: Path, start: int, iteration: int) -> list[str]:
    """A line for each environment that made any of these iterations, if not this one."""
    entries = environment.history(folder)
    here, lines = environment.environment(), []
    for place, entry in enumerate(entries):
        first = max(entry["from_iteration"], start)
        following = entries[place + 1 :]
        last = min([iteration, *(one["from_iteration"] - 1 for one in following)])
        changes = environment.differences(entry["environment"], here)
        if first <= last and changes:
            lines.append(
                f"the run made iterations {first} to {last} in another environment "
                f"({'; '.join(changes)}): here they may differ in the last digits"
            )
    return lines


def _state(run: Run, folder: Path, start: int) -> TrainState:
    state = run.initial_state()
    run.forget_base()
    if not start:
        return state
    with Checkpointer(folder / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(state, start)


def _compared(iteration: int, metrics: Row, row: Row | None) -> Checked:
    """The metrics that both have, without those that tell time."""
    if row is None:
        return Checked(iteration, 0, {})
    here = {
        name: float(number(name, jax.device_get(value)))
        for name, value in metrics.items()
        if name in row and not metric_names.is_time(name)
    }
    differing = {
        name: (value, row[name])
        for name, value in here.items()
        if not np.array_equal(value, row[name], equal_nan=True)
    }
    return Checked(iteration, len(here) - len(differing), differing)


def _apart(checked: Checked, sampled: Row) -> Checked:
    """With what was learned, which is all but these metrics, told apart."""
    differing, learned = (
        {
            name: pair
            for name, pair in checked.differing.items()
            if (name in sampled) is wanted
        }
        for wanted in (True, False)
    )
    return checked._replace(differing=differing, learned=learned)
