"""Packing: the nodes of many plans, in rounds of one fixed-size microbatch.

Chains, branches and suffixes of different lengths become one table: in every round
the network runs once, on whichever nodes are ready, those with the longest way ahead
first. The tables are numbers, so a window that moves does not recompile; their shapes
are those of the largest plans, and rounds that are not needed are not run.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgrpo_jax.flow.plan import DETERMINISTIC, FIRST_SHARED_MEMBER, ROOT, Plan

# int32 and float32, of the host before they are placed on the mesh, then of the device
Ints = Any
Floats = Any


class Job(NamedTuple):
    """A plan to carry out for a prompt; its members are numbered from `member` on."""

    prompt: int
    plan: Plan
    member: int = 0


class Steps(NamedTuple):
    """How latents come to be: the parent's row and the two ends of the step.

    A root is its own parent, on a step of no length: it is its noise. `fresh` is 1
    for a stochastic step; `noise` is the row of the noise of either. `before` is the
    grandparent's row of a second-order step and the parent's row of any other,
    `earlier` its sigma (None where a pack has no second-order step).
    """

    parent: Ints
    start: Ints
    stop: Ints
    fresh: Floats
    noise: Ints
    before: Ints | None
    earlier: Ints | None


class Noise(NamedTuple):
    """Rows of fresh noise; `counter` is 0 at a root, else 1 + the step it belongs to."""

    prompt: Ints
    member: Ints
    counter: Ints


class Tables(NamedTuple):
    """One pack; a leading axis numbers packs. A row is round * microbatch + slot."""

    rounds: Ints  # how many are in use
    prompt: Ints  # [round, slot]
    used: Floats  # [round, slot]: 1, or 0 for an idle slot
    steps: Steps  # [round, slot]
    noise: Noise  # [noisy]
    leaf: Steps  # [leaf]
    state: Ints  # [state]: row
    start: Ints  # [state]
    stop: Ints  # [state]
    action: Ints  # [state, sibling]: row; leaves are numbered from the last row on


class Shape(NamedTuple):
    """Sizes that are static in the compiled program; equal for all packs of a run."""

    rounds: int
    noisy: int
    leaves: int
    states: int
    siblings: int
    second_order: bool


def shape_of(plans: Sequence[Plan], per_pack: int, microbatch: int) -> Shape:
    """Room for any `per_pack` of these plans (the kinds that a run may draw).

    Rounds: list scheduling never needs more than nodes / microbatch + longest way.
    """
    nodes = per_pack * max(len(p.evaluated) for p in plans)
    longest = max(int(p.height.max()) for p in plans)
    noisy = [np.count_nonzero(p.table[:, 2] != DETERMINISTIC) for p in plans]
    siblings = {p.siblings for p in plans}
    assert len(siblings) == 1, "plans of one run act alike"
    return Shape(
        rounds=-(-nodes // microbatch) + longest,
        noisy=per_pack * int(max(noisy)),
        leaves=per_pack * max(len(p.leaves) for p in plans),
        states=per_pack * max(len(p.states) for p in plans),
        siblings=siblings.pop(),
        second_order=any(p.table[:, 4].any() for p in plans),
    )


def schedule(plans: Sequence[Plan], microbatch: int) -> list[np.ndarray]:
    """Row of every node of every plan (leaves: -1), by list scheduling."""
    children: list[list[list[int]]] = []
    heap: list[tuple[int, int, int]] = []
    for number, plan in enumerate(plans):
        below: list[list[int]] = [[] for _ in plan.nodes]
        for node in plan.evaluated.tolist():
            parent = plan.nodes[node].parent
            if parent == ROOT:
                heap.append((-int(plan.height[node]), number, node))
            else:
                below[parent].append(node)
        children.append(below)
    heapq.heapify(heap)
    rows = [np.full(len(plan.nodes), -1) for plan in plans]
    first = 0
    while heap:
        taken = [heapq.heappop(heap) for _ in range(min(microbatch, len(heap)))]
        for slot, (_, number, node) in enumerate(taken):
            rows[number][node] = first + slot
        for _, number, node in taken:
            height = plans[number].height
            for child in children[number][node]:
                heapq.heappush(heap, (-int(height[child]), number, child))
        first += microbatch
    return rows


class Packer:
    """Makes tables of one shape; schedules of plans that recur are made once."""

    def __init__(self, shape: Shape, microbatch: int):
        self.shape, self.microbatch = shape, microbatch
        self._schedules: dict[tuple[Plan, ...], list[np.ndarray]] = {}

    def pack(self, jobs: Sequence[Job]) -> Tables:
        """The tables of one pack; fewer jobs than fit leave the rest empty."""
        plans = tuple(job.plan for job in jobs)
        if plans not in self._schedules:
            if len(self._schedules) > 256:
                self._schedules.clear()
            self._schedules[plans] = schedule(plans, self.microbatch)
        rows = self._schedules[plans]
        shape, slots = self.shape, self.microbatch
        total = shape.rounds * slots
        used = 1 + max((int(r.max()) for r in rows), default=-1)
        nodes = [_node_columns(job, row) for job, row in zip(jobs, rows, strict=True)]
        every = {k: _joined([n[k] for n in nodes]) for k in _COLUMNS}
        noisy = every["noisy"] > 0
        every["noise"] = np.where(noisy, np.cumsum(noisy) - 1, 0)
        clean = every["row"] < 0  # leaves have no row
        inner = {k: v[~clean] for k, v in every.items()}
        outer = {k: v[clean] for k, v in every.items()}

        def in_rows(values):
            out = np.zeros(total, np.int32)
            out[inner["row"]] = values
            return out.reshape(shape.rounds, slots)

        def steps(place, columns):
            second = ("before", "earlier") if shape.second_order else ()
            names = ("parent", "start", "stop", "fresh", "noise", *second)
            table = Steps(**dict.fromkeys(Steps._fields))
            table = table._replace(**{name: place(columns[name]) for name in names})
            return table._replace(fresh=np.asarray(table.fresh, np.float32))

        return Tables(
            rounds=np.int32(-(-used // slots)),
            prompt=in_rows(inner["prompt"]),
            used=in_rows(1).astype(np.float32),
            steps=steps(in_rows, inner),
            noise=Noise(
                *(
                    _padded(every[name][noisy], shape.noisy)
                    for name in ("prompt", "member", "counter")
                )
            ),
            leaf=steps(lambda values: _padded(values, shape.leaves), outer),
            **self._states(jobs, rows, total),
        )

    def _states(self, jobs, rows, total) -> dict[str, np.ndarray]:
        state, start, stop, action = [], [], [], []
        first_leaf = total
        for job, row in zip(jobs, rows, strict=True):
            plan = job.plan
            place = row.copy()
            place[plan.leaves] = first_leaf + np.arange(len(plan.leaves))
            first_leaf += len(plan.leaves)
            for node, actions in plan.states:
                state.append(row[node])
                start.append(plan.nodes[node].at)
                stop.append(plan.nodes[actions[0]].at)
                action.append(place[list(actions)])
        shape = self.shape
        actions = np.array(action, np.int32).reshape(-1, shape.siblings)
        return {
            "state": _padded(np.array(state), shape.states),
            "start": _padded(np.array(start), shape.states),
            # A padded step has a length: no log-prob of it is read, but none is nan.
            "stop": _padded(np.array(stop), shape.states, fill=1),
            "action": _padded(actions, shape.states),
        }


_COLUMNS = [
    *("row", "prompt", "parent", "start", "stop", "fresh", "before", "earlier"),
    *("noisy", "member", "counter"),
]


def _node_columns(job: Job, row: np.ndarray) -> dict[str, np.ndarray]:
    plan = job.plan
    parent, at, noise, _, second = plan.table.T
    root = parent == ROOT
    safe = np.where(root, np.arange(len(parent)), parent)
    start = at[safe]
    grandparent = np.where(root[safe], safe, plan.table[safe, 0])
    before = np.where(second > 0, grandparent, safe)
    return {
        "row": row,
        "prompt": np.full(len(row), job.prompt),
        "parent": np.where(root, row, row[safe]),
        "start": start,
        "stop": at,
        "fresh": ((noise != DETERMINISTIC) & ~root).astype(np.int32),
        "before": row[before],
        "earlier": at[before],
        "noisy": (noise != DETERMINISTIC).astype(np.int32),
        "member": np.where(noise < FIRST_SHARED_MEMBER, noise + job.member, noise),
        "counter": np.where(root, 0, start + 1),
    }


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _padded(values: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    out = np.full((length, *values.shape[1:]), fill, np.int32)
    out[: len(values)] = values
    return out


# -- packs on devices -----------------------------------------------------------------


def jobs_per_pack(plan: Plan, jobs: int, microbatch: int, enough: float = 0.95) -> int:
    """The smallest divisor of `jobs` whose packs keep `enough` of the slots busy.

    Small packs need little memory; the best one if none is good enough.
    """
    best, best_share = jobs, 0.0
    for size in (n for n in range(1, jobs + 1) if jobs % n == 0):
        rows = schedule([plan] * size, microbatch)
        rounds = 1 + max(int(r.max()) for r in rows) // microbatch
        share = size * len(plan.evaluated) / (rounds * microbatch)
        if share >= enough:
            return size
        if share > best_share:
            best, best_share = size, share
    return best


class Packed(NamedTuple):
    """All packs of an iteration and where their prompts' results stand.

    Packs are dealt to the devices in turn; the leading axis of `tables` has first all
    packs of device 0, then of device 1, ...: equally many, the last ones may be empty.
    `place` [job, 2]: the pack (in that order) and the number within it.
    """

    tables: Tables
    place: np.ndarray
    per_pack: int


def pack_all(
    packer: Packer, jobs: Sequence[Job], per_pack: int, devices: int
) -> Packed:
    """Tables of all jobs, `per_pack` jobs to a pack."""
    groups = [jobs[i : i + per_pack] for i in range(0, len(jobs), per_pack)]
    each = -(-len(groups) // devices)
    groups += [[]] * (each * devices - len(groups))
    order = [d + n * devices for d in range(devices) for n in range(each)]
    packs = [packer.pack(groups[g]) for g in order]
    tables = Tables(*(_stack(column) for column in zip(*packs, strict=True)))
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    number = np.arange(len(jobs))
    place = np.stack([position[number // per_pack], number % per_pack], axis=1)
    return Packed(tables, place, per_pack)


def split(packed: Packed, parts: int, devices: int) -> list[Packed]:
    """Its packs in so many parts, equally many of every device in each.

    Jobs stay in their order: the first part holds the first of them. ValueError if
    the packs of a device cannot be parted so.
    """
    each = len(packed.tables.rounds) // devices
    if each % parts:
        raise ValueError(f"{each} packs of a device in {parts} equal parts")
    size = each // parts
    pack, number = packed.place.T
    device, turn = pack // each, pack % each
    place = np.stack([device * size + turn % size, number], axis=1)

    def taken(part):
        def rows(column):
            by_device = column.reshape(devices, parts, size, *column.shape[1:])
            return by_device[:, part].reshape(devices * size, *column.shape[1:])

        return jax.tree.map(rows, packed.tables)

    return [
        Packed(taken(part), place[turn // size == part], packed.per_pack)
        for part in range(parts)
    ]


def collect(values: np.ndarray, packed: Packed) -> np.ndarray:
    """[pack, what of all its jobs, ...] to [job, what, ...], in the order of jobs."""
    return collect_some(values, packed, np.arange(len(values)))[1]


def collect_some(
    values: np.ndarray, packed: Packed, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `collect`, where `values` has only the packs of these numbers.

    (jobs, [job, what, ...]): those in these packs, in order.
    """
    where = np.full(len(packed.tables.rounds), -1)
    where[rows] = np.arange(len(rows))
    pack, number = packed.place.T
    jobs = np.flatnonzero(where[pack] >= 0)
    each = values.shape[1] // packed.per_pack
    by_job = values.reshape(len(values), packed.per_pack, each, *values.shape[2:])
    return jobs, by_job[where[pack[jobs]], number[jobs]]


def numbers(jobs: np.ndarray, each: int) -> np.ndarray:
    """The numbers of what these jobs have, where every job has so many."""
    return (jobs[:, None] * each + np.arange(each)).reshape(-1)


def _stack(column):
    if column[0] is None:
        return None
    if isinstance(column[0], tuple):
        return type(column[0])(*(_stack(part) for part in zip(*column, strict=True)))
    return np.stack(column)
