"""From the rewards of an iteration to the entries that its updates learn from.

Leaves are images, edges are trained actions; both are numbered prompt after prompt in
the order of their plans. All of it is host code over integers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flowgrpo_jax.engine.planner import rank_of_step, steps_in_order
from flowgrpo_jax.flow.packing import Job, Packed
from flowgrpo_jax.flow.plan import LeafLabel, Plan
from flowgrpo_jax.rl import advantage
from flowgrpo_jax.rl.advantage import AdvantageSpec
from flowgrpo_jax.rl.update import UpdateBatch

# Leaves that rate the policy: the images of column 0. Others are coarser finishes,
# probes of states on the way, or the anchor's own image.
OWN_IMAGE = 0


@dataclass(frozen=True)
class UpdateSpec:
    """How what was sampled is dealt to the optimizer steps of an iteration.

    `in_steps`: one update per trained step, in place of chunks of prompts. Of samples:
    `draws` sigmas each, and of a group the best alone if `best_only`. Whoever has no
    advantage leaves the mean, or with `count_zeros` counts in it. If `exact`, every
    pack has batches of its own, which are the same on any mesh.
    """

    updates_per_iteration: int
    microbatch: int
    in_steps: bool = False
    draws: int = 1
    best_only: bool = False
    count_zeros: bool = False
    exact: bool = False

    def weight(self, advantage: np.ndarray) -> np.ndarray:
        """1 for what an update averages over; an advantage of NaN is not known."""
        counts = np.isfinite(advantage)
        if not self.count_zeros:
            counts &= advantage != 0
        return counts.astype(np.float32)


class Leaves(NamedTuple):
    """All images of an iteration, prompt after prompt."""

    prompt: np.ndarray  # number of the prompt within the iteration
    key: np.ndarray  # what an image is compared with
    own: np.ndarray  # whether it rates the policy
    credited: np.ndarray  # whether any action answers for it


def leaves_of(jobs: Sequence[Job], advantage_key: str) -> Leaves:
    """The images of these plans; `advantage_key` is prompt, step or anchor."""
    prompt = np.repeat(np.arange(len(jobs)), [len(j.plan.labels) for j in jobs])
    labels = [label for job in jobs for label in job.plan.labels]
    names = [(p, *_key(x, advantage_key)) for p, x in zip(prompt, labels, strict=True)]
    _, key = np.unique(np.array(names), axis=0, return_inverse=True)
    credited = [_credited(job.plan) for job in jobs]
    own = np.array([label.column == OWN_IMAGE for label in labels])
    return Leaves(prompt, key.reshape(-1), own, np.concatenate(credited))


def joined(parts: Sequence[Mapping[str, Any]], count: int) -> dict[str, np.ndarray]:
    """Measurements [leaf] of all images, from those that each process has scored.

    A part has "measured", by name, of images whose "numbers" are in arrays one after
    the other; NaN where a process measured no such thing (all its rewards failed).
    """
    parts = [part for part in parts if part["numbers"]]
    numbers = [np.concatenate(part["numbers"]) for part in parts]
    order = np.argsort(np.concatenate(numbers))
    assert len(order) == count
    names = dict.fromkeys(name for part in parts for name in part["measured"])
    return {
        name: np.concatenate(
            [
                part["measured"].get(name, np.full(len(own), np.nan, np.float32))
                for part, own in zip(parts, numbers, strict=True)
            ]
        )[order]
        for name in names
    }


def scored(leaves: Leaves, scores: np.ndarray) -> Leaves:
    """Without the prompts of which any image has the score NaN: all rewards failed.

    Their images rate nothing, and no action answers for them.
    """
    whole = ~np.isin(leaves.prompt, leaves.prompt[np.isnan(scores)])
    return leaves._replace(own=leaves.own & whole, credited=leaves.credited & whole)


def _key(label: LeafLabel, advantage_key: str) -> tuple[int, int, int]:
    if advantage_key == "prompt":
        return (0, 0, label.column)
    if advantage_key == "step":
        return (0, label.step, label.column)
    return (label.anchor, label.step, label.column)


def _credited(made: Plan) -> np.ndarray:
    """Which leaves an action answers for; where nothing acts, all are rated alike."""
    if not made.credit:
        return np.ones(len(made.labels), bool)
    mask = np.zeros(len(made.labels), bool)
    rows = np.array(made.credit)
    mask[rows[rows >= 0]] = True
    return mask


def of_actions(
    spec: AdvantageSpec,
    measured: Mapping[str, np.ndarray],
    jobs: Sequence[Job],
    leaves: Leaves,
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages [edge] of all trained actions, and metrics of the groups.

    NaN where no image that has a score answers for the action.
    """
    first = np.cumsum([0, *(len(job.plan.labels) for job in jobs)])
    rows, keys = [], []
    for number, job in enumerate(jobs):
        credit = np.array(job.plan.credit)
        rows.append(np.where(credit >= 0, credit + first[number], -1))
        parents = job.plan.table[job.plan.trained, 0]
        at = job.plan.table[parents, 1]
        keys.append(number * (job.plan.num_steps + 1) + at)
    credit, edge_key = np.concatenate(rows), np.concatenate(keys)
    edges, stats = _advantages(spec, measured, leaves, credit, edge_key)
    answered = (leaves.credited[credit] & (credit >= 0)).any(axis=1)
    return np.where(answered, edges, np.float32(np.nan)), stats


def of_samples(
    spec: AdvantageSpec,
    measured: Mapping[str, np.ndarray],
    leaves: Leaves,
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages [leaf] of all images, and metrics of the groups."""
    each = np.arange(len(leaves.prompt))[:, None]
    return _advantages(spec, measured, leaves, each, leaves.prompt)


def _advantages(spec, measured, leaves, credit, edge_key):
    # An anchor's own image is no one's, and one without a score tells nothing: they
    # enter no group and no global std.
    used = leaves.credited
    number = np.where(used, np.cumsum(used) - 1, -1)
    credit = np.where(credit >= 0, number[credit], -1)
    return advantage.advantages(
        {name: values[used] for name, values in measured.items()},
        spec.weights,
        leaves.prompt[used],
        leaves.key[used],
        credit,
        edge_key,
        **spec.options(),
    )


# -- update batches -------------------------------------------------------------------


def batch_of_actions(
    spec: UpdateSpec,
    jobs: Sequence[Job],
    packed: Packed,
    edges: np.ndarray,
    devices: int,
) -> UpdateBatch:
    """Entries of all states, with the advantages [edge] of the actions taken there.

    Which of them the mean counts is `UpdateSpec.weight`.
    """
    columns: dict[str, list] = {"item": [], "pack": [], "prompt": [], "advantage": []}
    update = []
    parts = steps_in_order([job.plan for job in jobs]) if spec.in_steps else 1
    chunk = len(jobs) // spec.updates_per_iteration
    states = packed.tables.state.shape[1] // packed.per_pack
    first = 0
    for job, (pack, number) in zip(jobs, packed.place.tolist(), strict=True):
        made = job.plan
        edge_of = {node: first + n for n, node in enumerate(made.trained.tolist())}
        first += len(edge_of)
        rank = rank_of_step(made) if spec.in_steps else [0] * len(made.states)
        for state, (_, actions) in enumerate(made.states):
            columns["item"].append(number * states + state)
            columns["pack"].append(pack)
            columns["prompt"].append(job.prompt)
            columns["advantage"].append([edges[edge_of[node]] for node in actions])
            update.append(job.prompt // chunk * parts + rank[state])
    flat = {name: np.array(values) for name, values in columns.items()}
    unit, units, first_item = _units(flat["pack"], packed, devices, states, spec.exact)
    return _arrange(
        np.array(update),
        unit,
        units,
        spec.microbatch,
        item=flat["item"] + first_item,
        prompt=flat["prompt"],
        weight=spec.weight(flat["advantage"]),
        advantage=np.nan_to_num(flat["advantage"]).astype(np.float32),
        reward=np.zeros(flat["advantage"].shape, np.float32),
        number=np.zeros(flat["advantage"].shape, np.int32),
        draw=np.zeros(len(update), np.int32),
    )


def batch_of_samples(
    spec: UpdateSpec,
    packed: Packed,
    rewards: np.ndarray,
    advantages: np.ndarray,
    together: str,
    devices: int,
) -> UpdateBatch:
    """Entries of images [prompt, member] for forward-process objectives.

    A prompt whose rewards are NaN teaches nothing: its entries have no weight. Of the
    others `UpdateSpec.weight` tells.
    `together` says who shares an entry: one image, the best and the worst as a pair,
    or the whole group; `best_only` leaves the others out. Each is drawn
    `draws` times, at another sigma and with other noise.
    """
    prompts, group = rewards.shape
    draws = spec.draws
    known = np.isfinite(rewards.reshape(-1))
    flat = np.where(known, rewards.reshape(-1), 0)
    owner = np.repeat(np.arange(prompts), group)
    if together == "pair":
        members = advantage.best_and_worst(flat, owner, 1, 1)
    elif spec.best_only:
        members = advantage.best_and_worst(flat, owner, 1, 0)
    elif together == "group":
        members = np.arange(flat.size).reshape(prompts, group)
    else:
        members = np.arange(flat.size)[:, None]
    members = np.repeat(members, draws, axis=0)
    draw = np.tile(np.arange(draws), len(members) // draws)
    prompt = members[:, 0] // group
    pack, number = packed.place[prompt].T
    leaves = packed.tables.leaf.start.shape[1] // packed.per_pack
    where = number[:, None] * leaves + members % group
    chunk = prompts // spec.updates_per_iteration
    unit, units, first_item = _units(pack, packed, devices, leaves, spec.exact)
    return _arrange(
        prompt // chunk,
        unit,
        units,
        max(1, spec.microbatch // members.shape[1]),
        item=where + first_item[:, None],
        prompt=prompt,
        weight=spec.weight(np.where(known, advantages.reshape(-1), np.nan)[members]),
        advantage=advantages.reshape(-1)[members].astype(np.float32),
        reward=flat[members].astype(np.float32),
        number=members % group,
        draw=draw,
    )


def batch_of_scenes(
    numbers: np.ndarray, microbatch: int, devices: int, exact: bool = False
) -> tuple[np.ndarray, UpdateBatch]:
    """Entries of captioned scenes for pretraining: ([pack, leaf] numbers, entries)."""
    packs = -(-len(numbers) // microbatch)
    packs = -(-packs // devices) * devices
    rows = np.zeros(packs * microbatch, np.int32)
    rows[: len(numbers)] = numbers
    mask = np.zeros(packs * microbatch, np.float32)
    mask[: len(numbers)] = 1
    lead = (1, packs, microbatch)
    items = microbatch * (1 if exact else packs // devices)  # of a pack or a device
    local = np.arange(packs * microbatch) % items
    blank = np.zeros((*lead, 1), np.float32)
    update_batch = UpdateBatch(
        item=local.reshape(*lead, 1).astype(np.int32),
        prompt=rows.reshape(lead),
        weight=mask.reshape(*lead, 1),
        advantage=blank,
        reward=blank,
        number=np.zeros((*lead, 1), np.int32),
        draw=np.zeros(lead, np.int32),
    )
    return rows.reshape(packs, microbatch), update_batch


def _units(pack, packed: Packed, devices: int, each: int, exact: bool) -> tuple:
    """(whose batches an entry is in, of how many, what its number begins with there).

    Of a device's, with the items of all its packs; if `exact`, of a pack's.
    """
    packs = len(packed.tables.rounds)
    if exact:
        return pack, packs, np.zeros_like(pack)
    packs_each = packs // devices
    return pack // packs_each, devices, pack % packs_each * packed.per_pack * each


def _arrange(update, unit, units, slots, **columns) -> UpdateBatch:
    """Columns [entry, ...] to [update, batch, slot, ...]; a unit's batches in a row.

    Units are the devices, or else the packs. Entries that teach something come first, so
    that the batches left over can be skipped whole.
    """
    updates = int(update.max()) + 1
    counts = np.zeros((updates, units), np.int64)
    np.add.at(counts, (update, unit), 1)
    batches = -(-int(counts.max()) // slots)
    idle = ~(columns["weight"] != 0).any(axis=1)
    order = np.lexsort((np.arange(len(update)), idle, unit, update))
    starts = np.cumsum(counts.reshape(-1)) - counts.reshape(-1)
    cell = update[order] * units + unit[order]
    within = np.arange(len(order)) - starts[cell]
    place = cell * batches * slots + within

    def table(values):
        dtype = np.float32 if values.dtype.kind == "f" else np.int32
        out = np.zeros((updates * units * batches * slots, *values.shape[1:]), dtype)
        out[place] = values[order]
        return out.reshape(updates, units * batches, slots, *values.shape[1:])

    return UpdateBatch(**{name: table(values) for name, values in columns.items()})
