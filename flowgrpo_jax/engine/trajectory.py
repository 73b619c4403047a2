"""The way of one training sample, step by step, as its iteration went it.

The rollout of an iteration keeps the states of trained steps and the clean latents. The
other states of one way are sampled once more, alone: the noise of a sample follows from
its numbers, and what a microbatch is filled with changes no row of it. Where both give
a number they are compared bit for bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit, programs
from flowgrpo_jax.engine.collected import Collected
from flowgrpo_jax.flow import packing, plan
from flowgrpo_jax.flow.plan import DETERMINISTIC, Plan
from flowgrpo_jax.models.flow_model import decoding

Latent = Float32[np.ndarray, "height width channel"]
Image = Float[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Step:
    """One step of a way, from sigma number `start` to number `stop`.

    `picture` is the decoded state at its start, `predicted` the decoded clean latent
    that the velocity there points to. `log_prob` is that of a stochastic step, and
    `advantage` that of a trained one whose images have rewards. `answers_for`: the
    leaves of the prompt that reward a trained step, -1 for none.
    """

    start: int
    stop: int
    sigma: float
    sigma_next: float
    stochastic: bool
    trained: bool
    latent: Latent
    next_latent: Latent
    velocity: Latent
    picture: Image
    predicted: Image
    log_prob: float | None = None
    advantage: float | None = None
    answers_for: tuple[int, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """An image of the prompt, and what it got; `member` is None for no one's own.

    That is a probe of a state on the way or a coarser finish. NaN is no reward.
    """

    number: int
    member: int | None
    image: Image
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Trajectory:
    """One training sample: its steps, its image, its rewards and its advantage.

    `advantage` is that of the image where images are learned from, None where steps
    are: these have theirs. `others` are the images of the prompt that its steps answer
    for beside its own, and `group` the members' rewards as they are added up.
    `unequal` says what was not the same bits when its way was sampled alone.
    """

    prompt: Prompt
    clean: Latent
    leaf: Leaf
    steps: Sequence[Step]
    advantage: float | None
    others: Sequence[Leaf]
    group: Float[np.ndarray, " member"]
    unequal: Sequence[str]


class _Alone(NamedTuple):
    """What a rollout of one way by itself keeps; all but `clean` lead with [step]."""

    latent: np.ndarray
    next_latent: np.ndarray
    velocity: np.ndarray
    log_prob: np.ndarray
    clean: Latent


def members(made: Plan) -> list[int]:
    """The numbers of the leaves that are members of the group, in order."""
    own = credit.OWN_IMAGE
    return [n for n, label in enumerate(made.labels) if label.column == own]


def of(got: Collected, prompt: int, member: int) -> Trajectory:
    """The way of a member of a prompt's group.

    `prompt` is a number within the iteration and `member` one within its `members`.
    For one process, before the update. IndexError for numbers that are not there.
    """
    job = got.jobs[prompt]
    made, own = job.plan, members(job.plan)
    way = plan.way(made, own[member])
    alone = _alone(got, job, way)
    kept = _kept(got, prompt)
    advantages, of_image = _advantages(got, prompt, own[member])
    sigmas = got.work.sampler.sigmas
    starts = [made.nodes[node].at for node in way[:-1]]
    predicted = _predictions(alone, [sigmas[start] for start in starts])
    pictures = _decoded(got, [*alone.latent, *predicted])
    unequal, steps = [], []
    for number, node in enumerate(way[1:]):
        _, at, noise, trained, _ = made.nodes[node]
        start = starts[number]
        stochastic = noise != DETERMINISTIC
        latent, following, log_prob = (
            alone.latent[number],
            alone.next_latent[number],
            alone.log_prob[number],
        )
        if node in kept:
            again = (latent, following, log_prob)
            latent, following, log_prob = kept[node]
            if told := _differences(again, kept[node]):
                unequal.append(f"step {start}: {told}")
        steps.append(
            Step(
                start,
                at,
                sigmas[start],
                sigmas[at],
                stochastic,
                bool(trained),
                latent,
                following,
                alone.velocity[number],
                pictures[number],
                pictures[len(starts) + number],
                float(log_prob) if stochastic else None,
                advantages.get(node),
                made.credit[made.trained.tolist().index(node)] if trained else (),
            )
        )
    clean = packing.collect(jax.device_get(got.made.clean), got.packed)[prompt]
    if not np.array_equal(alone.clean, clean[own[member]]):
        unequal.append("the clean latent")
    answered = {leaf for step in steps for leaf in step.answers_for}
    others = sorted(answered - {-1, own[member]})
    first = _first_leaf(got, prompt)
    return Trajectory(
        got.prompts[prompt],
        clean[own[member]],
        _leaf(got, prompt, own[member]),
        steps,
        of_image,
        [_leaf(got, prompt, leaf) for leaf in others],
        np.array([got.measured["avg"][first + leaf] for leaf in own]),
        unequal,
    )


def _first_leaf(got: Collected, prompt: int) -> int:
    return sum(len(job.plan.labels) for job in got.jobs[:prompt])


def _leaf(got: Collected, prompt: int, leaf: int) -> Leaf:
    number = _first_leaf(got, prompt) + leaf
    place = np.concatenate(got.numbers).tolist().index(number)
    own = members(got.jobs[prompt].plan)
    return Leaf(
        leaf,
        own.index(leaf) if leaf in own else None,
        np.concatenate(got.images)[place],
        {name: float(values[number]) for name, values in got.measured.items()},
    )


def _alone(got: Collected, job: packing.Job, way: Sequence[int]) -> _Alone:
    """One way, sampled by itself."""
    work, learner = got.work, got.work.learner
    by_itself = plan.alone(job.plan, way)
    shape = packing.shape_of([by_itself], 1, learner.microbatch)
    packer = packing.Packer(shape, learner.microbatch)
    packed = packing.pack_all(packer, [job._replace(plan=by_itself)], 1, work.mesh.size)
    program = programs.make_rollout(
        work.mesh,
        work.variables_specs,
        dataclasses.replace(work.sampler, keep_velocity=True),
        work.model.latent_shape,
        learner.dtype,
    )
    tables = work.place(packed.tables, programs.PACKS)
    made = program(got.variables, got.key, tables, got.text, got.empty)
    kept = made.transitions
    latent, following, velocity, log_prob, clean = (
        packing.collect(values, packed)[0]
        for values in jax.device_get(
            (kept.latent, kept.next_latent, kept.velocity, kept.log_prob, made.clean)
        )
    )
    return _Alone(latent, following[:, 0], velocity, log_prob[:, 0], clean[0])


def _kept(got: Collected, prompt: int) -> dict[int, tuple[Any, Any, Any]]:
    """(latent, next latent, log-prob) of trained nodes, as the iteration kept them."""
    if got.made.transitions is None:
        return {}
    latent, following, log_prob = (
        packing.collect(jax.device_get(values), got.packed)[prompt]
        for values in (
            got.made.transitions.latent,
            got.made.transitions.next_latent,
            got.made.transitions.log_prob,
        )
    )
    return {
        node: (latent[state], following[state, sibling], log_prob[state, sibling])
        for state, (_, actions) in enumerate(got.jobs[prompt].plan.states)
        for sibling, node in enumerate(actions)
    }


def _differences(again: Sequence[Any], kept: Sequence[Any]) -> str:
    names = ("its state", "the next one", "the log-prob")
    gaps = {
        name: float(np.max(np.abs(one - other)))
        for name, one, other in zip(names, again, kept, strict=True)
        if not np.array_equal(one, other)
    }
    return ", ".join(f"{name} by {gap:.3g}" for name, gap in gaps.items())


def _advantages(
    got: Collected, prompt: int, leaf: int
) -> tuple[dict[int, float], float | None]:
    """(those of the prompt's trained nodes, that of the image): one of them is empty."""
    if got.update_batch is None:  # no prompt has a reward
        return {}, None
    if got.work.learns_from_samples:
        images, _ = credit.of_samples(got.work.advantage, got.measured, got.leaves)
        return {}, _known(images[_first_leaf(got, prompt) + leaf])
    edges, _ = credit.of_actions(got.work.advantage, got.measured, got.jobs, got.leaves)
    first = sum(len(job.plan.trained) for job in got.jobs[:prompt])
    values = {
        node: _known(edges[first + n])
        for n, node in enumerate(got.jobs[prompt].plan.trained.tolist())
    }
    return {node: value for node, value in values.items() if value is not None}, None


def _known(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


def _predictions(alone: _Alone, sigmas: Sequence[float]) -> np.ndarray:
    """[step, ...]: the clean latents that velocities point to, x - sigma v."""
    sigma = np.array(sigmas, np.float32)[:, None, None, None]
    return alone.latent - sigma * alone.velocity


def _decoded(got: Collected, latents: Sequence[Latent]) -> np.ndarray:
    """Images of these latents, by the program that decodes the iteration's."""
    work = got.work
    devices = work.mesh.size
    rows = np.stack(latents).astype(np.float32)
    rows = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % devices, axis=0)])
    placed = work.place(rows.reshape(devices, -1, *rows.shape[1:]), programs.PACKS)
    images = jax.device_get(work.decode(decoding(got.variables), placed))
    return images.reshape(-1, *images.shape[2:])[: len(latents)]
