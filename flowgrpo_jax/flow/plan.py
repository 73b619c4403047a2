"""Plans: the forest of network evaluations that a prompt's group is made of.

A node is one evaluation of the network: a latent at one sigma. Its parent is the node
whose velocity carried it there, by an Euler step, a second-order step or a stochastic
one; nodes at sigma 0 are leaves, clean latents, and cost no evaluation. Two paths that
begin alike are one path: what is already known is not computed again. A node with
trained children is a state, its trained children are the actions taken there.

A plan says which transitions are stochastic and trained, never how: that is
`transition.py`. Plans are host data, compared by identity and made once per value of
their arguments. Steps are indices of the sigmas: 0 (noisiest) .. num_steps (clean).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.errors import UserError

# `noise` of a step that is deterministic.
DETERMINISTIC = -1
# The member number from which a group that shares its first noise draws it; further
# anchors of a prompt count down from here.
SHARED_MEMBER = 2**31 - 1
# Members below it are a prompt's own images, which a job numbers from its first one on;
# those from here up to SHARED_MEMBER are shared noises, the same whatever the job.
FIRST_SHARED_MEMBER = 2**30
# No parent: the node begins as noise.
ROOT = -1


class Node(NamedTuple):
    """One node; `noise` is the member whose fresh noise its step (or root) takes."""

    parent: int
    at: int
    noise: int = DETERMINISTIC
    trained: bool = False
    second_order: bool = False


class LeafLabel(NamedTuple):
    """What a leaf shares with others: the key of its advantage group is made of this.

    `step` is where its last trained ancestor acted, `column` its granularity or probe.
    """

    anchor: int = 0
    step: int = 0
    column: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The forest of one prompt: parents before children.

    `labels` has one entry per leaf. `credit` has one row per trained node, both in
    the order of nodes: the numbers of the leaves that reward it, by column.
    """

    num_steps: int
    nodes: tuple[Node, ...]
    labels: tuple[LeafLabel, ...]
    credit: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """[node, 5]: the fields of every node."""
        return np.array(self.nodes, np.int64).reshape(-1, 5)

    @functools.cached_property
    def leaves(self) -> np.ndarray:
        """Numbers of the leaf nodes."""
        return np.flatnonzero(self.table[:, 1] == self.num_steps)

    @functools.cached_property
    def evaluated(self) -> np.ndarray:
        """Numbers of the nodes that cost a network evaluation."""
        return np.flatnonzero(self.table[:, 1] < self.num_steps)

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """Numbers of the nodes whose incoming transition is trained."""
        return np.flatnonzero(self.table[:, 3])

    @functools.cached_property
    def height(self) -> np.ndarray:
        """Evaluations on the longest way from each node to a leaf, its own included."""
        height = np.zeros(len(self.nodes), np.int64)
        for number in range(len(self.nodes) - 1, -1, -1):
            parent, at = self.nodes[number][:2]
            if at < self.num_steps:
                height[number] += 1
            if parent != ROOT:
                height[parent] = max(height[parent], height[number])
        return height

    @functools.cached_property
    def states(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(node, its trained children): one state, many actions.

        Where states have different numbers of actions, each action gets its own
        state: a rectangle of the largest number would be mostly empty.
        """
        children: dict[int, list[int]] = {}
        for number in self.trained:
            children.setdefault(self.nodes[number].parent, []).append(int(number))
        if len({len(group) for group in children.values()}) == 1:
            return tuple((node, tuple(group)) for node, group in children.items())
        pairs = ((node, (one,)) for node, group in children.items() for one in group)
        return tuple(pairs)

    @property
    def siblings(self) -> int:
        """Actions of every state."""
        return len(self.states[0][1]) if self.states else 1


class _Forest:
    """Builds a plan; a deterministic step that was taken before is taken once."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.nodes: list[Node] = []
        self.labels: list[LeafLabel] = []
        self._known: dict[tuple, int] = {}

    def root(self, noise: int) -> int:
        return self._once(Node(ROOT, 0, noise))

    def step(self, parent: int, at: int, second_order: bool = False) -> int:
        return self._once(Node(parent, at, second_order=second_order))

    def act(self, parent: int, at: int, noise: int, trained: bool) -> int:
        return self._add(Node(parent, at, noise, trained))

    def leaf(self, node: int, label: LeafLabel, second_order: bool = False) -> int:
        """Number of the leaf of `node`: itself if it is clean, else one step away."""
        if self.nodes[node].at != self.num_steps:
            self._add(Node(node, self.num_steps, second_order=second_order))
        self.labels.append(label)
        return len(self.labels) - 1

    def _once(self, node: Node) -> int:
        if node not in self._known:
            self._known[node] = self._add(node)
        return self._known[node]

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def plan(self, credit: dict[int, tuple[int, ...]]) -> Plan:
        rows = tuple(credit[n] for n, node in enumerate(self.nodes) if node.trained)
        plan = Plan(self.num_steps, tuple(self.nodes), tuple(self.labels), rows)
        assert len(plan.leaves) == len(plan.labels)
        return plan


Steps = tuple[int, ...]


@functools.lru_cache(maxsize=512)
def chains(
    num_steps: int,
    stochastic: Steps,
    trained: tuple[Steps, ...],
    shared: bool = False,
    finish: Steps = (),
    probe: int = 0,
) -> Plan:
    """One trajectory per member: Flow-GRPO and all that samples as it does.

    `trained` has the trained steps of every member (a part of `stochastic`), so its
    length is the group size. With `shared` all begin from one noise, and what they
    have in common up to their first stochastic step is computed once. `finish`: the
    steps visited after the last stochastic one, by a second-order solver, in place of
    all of them (MixGRPO-Flash). `probe` > 0: every state is completed by the ODE with
    at most so many evaluations, and an action is credited with the difference
    (DenseGRPO, arXiv 2601.20218).
    """
    _check(num_steps, stochastic, trained)
    forest = _Forest(num_steps)
    credit: dict[int, tuple[int, ...]] = {}
    ordinary = stochastic[-1] + 1 if finish and stochastic else num_steps
    ways = (*range(ordinary + 1), *finish) if finish else tuple(range(num_steps + 1))
    for member, steps in enumerate(trained):
        node = forest.root(SHARED_MEMBER if shared else member)
        probed = _probe(forest, node, 0, probe)
        acted: list[int] = []
        for start, stop in zip(ways, ways[1:], strict=False):
            second = bool(finish) and start >= ordinary
            if start in stochastic:
                node = forest.act(node, stop, member, start in steps)
            elif stop == num_steps:
                break
            else:
                node = forest.step(node, stop, second)
            if probe and stop < num_steps:
                before, probed = probed, _probe(forest, node, stop, probe)
                if start in steps:
                    credit[node] = (probed, before)
            elif start in steps:
                acted.append(node)
        last = bool(finish) and forest.nodes[node].at < num_steps
        final = forest.leaf(node, LeafLabel(), second_order=last)
        for one in acted:
            credit[one] = (final, probed) if probe else (final,)
    return forest.plan(credit)


def _probe(forest: _Forest, node: int, at: int, evaluations: int) -> int:
    """The leaf of an ODE completion of `node` in at most `evaluations` (0: none)."""
    if not evaluations:
        return -1
    num_steps = forest.num_steps
    count = min(evaluations, num_steps - at)
    visited = np.linspace(at, num_steps, count + 1).round().astype(int)[1:-1]
    for stop in visited:
        node = forest.step(node, int(stop))
    return forest.leaf(node, LeafLabel(step=at, column=1))


@functools.lru_cache(maxsize=512)
def branches(
    num_steps: int,
    steps: Steps,
    members: int,
    *,
    anchors: int = 1,
    window: int = 1,
    merge: Steps = (),
    granularities: Steps = (1,),
    whole_anchor: bool = False,
) -> Plan:
    """Singular stochastic sampling: `members` act at each of `steps` of an anchor.

    The anchor is an ODE trajectory; from its state at step k every member takes one
    stochastic step (`window` > 1: so many, one after the other) and goes on
    deterministically, once per granularity g: to k+1, k+2, then every g-th node, of
    which the last becomes the image: one step goes there from the last but one (G2RPO,
    arXiv 2510.01982, as released). `merge` has,
    per step, over how many sigmas its action goes (E-GRPO, arXiv 2601.00423); several
    `anchors` are TempFlow's seeds (arXiv 2508.04324). With `whole_anchor` the anchor
    is carried to its image too, which rewards nothing.
    """
    merge = merge or (1,) * len(steps)
    if len(merge) != len(steps):
        raise UserError(f"sample.merge_steps: {merge}: one number for each of {steps}")
    ends = [k + m + window - 1 for k, m in zip(steps, merge, strict=True)]
    if not steps or min(steps) < 0 or min(merge) < 1:
        raise UserError(
            f"sample.branch_steps: {steps}: must be one or more steps, each over at "
            f"least one sigma (sample.merge_steps: {merge})"
        )
    if max(ends) >= num_steps:
        raise UserError(
            f"sample.num_steps: {num_steps}: too few for sample.branch_steps {steps} "
            f"(or sample.sde_window_range): the last action ends at step {max(ends)}: "
            f"take at least {max(ends) + 1} steps, or set sample.branch_steps to "
            "earlier ones"
        )
    if not granularities or min(granularities) < 1:
        raise UserError(f"sample.granularities: {granularities}: at least 1 each")
    forest = _Forest(num_steps)
    credit: dict[int, tuple[int, ...]] = {}
    for anchor in range(anchors):
        node = forest.root(SHARED_MEMBER - anchor)
        way = [node]
        for at in range(1, num_steps if whole_anchor else max(steps) + 1):
            node = forest.step(node, at)
            way.append(node)
        if whole_anchor:
            forest.leaf(node, LeafLabel(anchor, num_steps, -1))
        for k, jump in zip(steps, merge, strict=True):
            for member in range(members):
                number = anchor * members + member
                acted, stop, node = [], k + jump, way[k]
                for more in range(window):
                    node = forest.act(node, stop + more, number, True)
                    acted.append(node)
                stop += window - 1
                leaves = []
                for column, g in enumerate(granularities):
                    last = node
                    thinned = (stop + 1, *range(stop + 1 + g, num_steps + 1, g))
                    for at in thinned[:-1]:
                        last = forest.step(last, at)
                    leaves.append(forest.leaf(last, LeafLabel(anchor, k, column)))
                credit |= dict.fromkeys(acted, tuple(leaves))
    return forest.plan(credit)


@functools.lru_cache(maxsize=512)
def tree(
    num_steps: int, splits: Steps, fanout: int, stochastic: Steps, trained: Steps
) -> Plan:
    """All trajectories share what comes before they part: BranchGRPO, TreeGRPO.

    At each step of `splits` every node gets `fanout` children; a trained step is
    credited with all leaves below it (arXiv 2509.06040).
    """
    if not set(splits) <= set(stochastic):
        raise UserError(f"sample.branch_steps: {splits}: must be stochastic steps")
    _check(num_steps, stochastic, (trained,))
    forest = _Forest(num_steps)
    # (node, number of its branch, trained nodes above it)
    front: list[tuple[int, int, tuple[int, ...]]] = [
        (forest.root(SHARED_MEMBER), 0, ())
    ]
    for start in range(num_steps):
        grown = []
        for node, number, above in front:
            if start not in stochastic:
                if start + 1 < num_steps:
                    node = forest.step(node, start + 1)
                grown.append((node, number, above))
                continue
            for child in range(fanout if start in splits else 1):
                own = number * fanout + child if start in splits else number
                following = forest.act(node, start + 1, own, start in trained)
                more = (following,) if start in trained else ()
                grown.append((following, own, above + more))
        front = grown
    below: dict[int, list[int]] = {}
    for node, _, above in front:
        leaf = forest.leaf(node, LeafLabel())
        for one in above:
            below.setdefault(one, []).append(leaf)
    width = max(map(len, below.values()))
    return forest.plan(
        {
            node: tuple(leaves) + (-1,) * (width - len(leaves))
            for node, leaves in below.items()
        }
    )


def _check(num_steps: int, stochastic: Steps, trained: tuple[Steps, ...]) -> None:
    if list(stochastic) != sorted(set(stochastic) & set(range(num_steps))):
        raise UserError(
            f"plan: stochastic steps {stochastic}: increasing steps of "
            f"0..{num_steps - 1}"
        )
    for steps in trained:
        if not set(steps) <= set(stochastic):
            raise UserError(
                f"plan: trained steps {steps}: must be among the stochastic ones "
                f"{stochastic}"
            )


def way(made: Plan, leaf: int) -> tuple[int, ...]:
    """Numbers of the nodes from the first noise to the leaf of this number."""
    node, nodes = int(made.leaves[leaf]), []
    while node != ROOT:
        nodes.append(node)
        node = made.nodes[node].parent
    return tuple(reversed(nodes))


def alone(made: Plan, nodes: Sequence[int]) -> Plan:
    """The plan of one `way` by itself, with the same noise.

    Every step counts as trained, since that is what a rollout keeps the states of.
    """
    kept = tuple(
        made.nodes[node]._replace(parent=number - 1, trained=number > 0)
        for number, node in enumerate(nodes)
    )
    return Plan(made.num_steps, kept, (LeafLabel(),), ((0,),) * (len(kept) - 1))


# -- which steps ----------------------------------------------------------------------


def fraction(num_steps: int, timestep_fraction: float) -> Steps:
    """The first int(num_steps * fraction) steps.

    Flow-GRPO's default of 0.99 leaves out the last step, whose tiny std makes huge
    likelihoods.
    """
    count = int(num_steps * timestep_fraction)
    if not 1 <= count <= num_steps:
        raise UserError(
            f"train.timestep_fraction: {timestep_fraction}: it trains {count} of "
            f"{num_steps} steps; at least 1 and at most all"
        )
    return tuple(range(count))


def random_subset(
    num_steps: int, share: float, seed: int, iteration: int, prompt: int, member: int
) -> Steps:
    """int(share * (num_steps - 1)) steps of all but the last (DanceGRPO)."""
    count = int(share * (num_steps - 1))
    if count < 1:
        raise UserError(
            f"train.timestep_fraction: {share}: trains none of {num_steps - 1} steps"
        )
    rng = _generator(seed, (member, prompt, iteration))
    return tuple(sorted(rng.permutation(num_steps - 1)[:count].tolist()))


def random_window(
    num_steps: int,
    size: int,
    window_range: tuple[int, int],
    seed: int,
    iteration: int,
    prompt: int,
) -> Steps:
    """Flow-GRPO-Fast: a window placed uniformly inside `window_range` = [low, high).

    The start is uniform on low .. high - size, both included, and a pure function
    of (seed, iteration, prompt): no generator state to checkpoint.
    """
    low, high = _window_range(num_steps, size, window_range)
    start = _generator(seed, (0, prompt, iteration)).integers(
        low, high - size, endpoint=True
    )
    return tuple(range(int(start), int(start) + size))


def progressive_window(
    num_steps: int,
    size: int,
    window_range: tuple[int, int],
    iteration: int,
    every: int,
    decay: float = 0.0,
) -> Steps:
    """MixGRPO's window: one step on every `every` iterations, then back to the start.

    With `decay` the window stays `every` * exp(-decay * max(start - 13, 0)) iterations
    at a start (arXiv 2507.21802). A pure function of the iteration.
    """
    low, high = _window_range(num_steps, size, window_range)
    starts = np.arange(low, high - size + 1)
    stay = every * np.exp(-decay * np.maximum(starts - 13, 0))
    stay = np.maximum(1, np.round(stay)).astype(int)
    start = starts[np.searchsorted(np.cumsum(stay), iteration % stay.sum(), "right")]
    return tuple(range(int(start), int(start) + size))


def compressed(num_steps: int, start: int, ratio: float) -> Steps:
    """Steps after `start` to clean, only ceil(ratio * their number) of them."""
    count = int(np.ceil(ratio * (num_steps - start)))
    return tuple(
        np.linspace(start, num_steps, count + 1).round().astype(int)[1:].tolist()
    )


def _generator(seed: int, counter: Sequence[int]) -> np.random.Generator:
    # The first word of the counter is what the generator itself advances.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, *counter]))


def _window_range(num_steps, size, window_range) -> tuple[int, int]:
    low, high = window_range
    if not (1 <= size and 0 <= low <= high - size and high <= num_steps):
        raise UserError(
            f"sample.sde_window_range: {tuple(window_range)}: must hold {size} (the "
            f"sde_window_size, at least 1) of the steps 0..{num_steps - 1}"
        )
    return low, high
