"""The plans of an iteration, packed for the mesh: a function of (seed, iteration)."""

import dataclasses
from collections.abc import Sequence

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing, plan
from flowgrpo_jax.flow.plan import Plan, Steps


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """Which transitions are stochastic, and how many prompts are packed how.

    `kind` and the fields down to `probe_steps` are what `sample.` of a config says,
    under the same names; see docs/algorithms.md, axis 2.
    """

    kind: str
    seed: int
    prompts_per_iteration: int
    group_size: int
    updates_per_iteration: int
    microbatch: int
    reward_batches: int  # parts of a rollout: one is scored while the next is sampled
    num_steps: int
    timestep_fraction: float
    exact: bool  # packs are the same on any mesh
    shared_noise: bool  # a group begins with one noise
    window_size: int
    window_range: tuple[int, int]
    window_every: int
    window_decay: float
    finish_ratio: float
    branch_steps: Steps
    branch_anchors: int
    merge_steps: tuple[int, ...]
    granularities: tuple[int, ...]
    whole_anchor: bool
    fanout: int
    probe_steps: int


class Planner:
    """The plans of a run: which transitions of every prompt are stochastic and trained.

    A pure function of (spec, iteration, prompt): a resumed run plans alike.
    """

    def __init__(self, spec: PlanSpec, devices: int):
        self.spec, self._devices = spec, devices
        self.kinds = self._kinds()
        prompts = spec.prompts_per_iteration
        # Chunks of prompts are whole packs, and every device should have one of each.
        per_chunk = prompts // spec.updates_per_iteration
        most = 1 if spec.exact else max(1, per_chunk // devices)
        fitting = max(n for n in range(1, most + 1) if per_chunk % n == 0)
        self.per_pack = packing.jobs_per_pack(self.kinds[0], fitting, spec.microbatch)
        self._check_batches(-(-prompts // self.per_pack))
        self._packer = packing.Packer(
            packing.shape_of(self.kinds, self.per_pack, spec.microbatch),
            spec.microbatch,
        )

    def _check_batches(self, packs: int) -> None:
        batches, each = self.spec.reward_batches, -(-packs // self._devices)
        if each % batches:
            allowed = [str(n) for n in range(1, each + 1) if each % n == 0]
            raise UserError(
                f"reward_batches: {batches}: must divide the {each} packs of a device: "
                f"take one of {', '.join(allowed)}"
            )

    def jobs(self, iteration: int) -> list[packing.Job]:
        """One job per prompt of the iteration."""
        return [
            packing.Job(prompt, self.plan(iteration, prompt))
            for prompt in range(self.spec.prompts_per_iteration)
        ]

    def pack(self, jobs: Sequence[packing.Job]) -> packing.Packed:
        """Their tables, of the same shape in every iteration."""
        return packing.pack_all(self._packer, jobs, self.per_pack, self._devices)

    def plan(self, iteration: int, prompt: int) -> Plan:
        """The plan of one prompt's group in one iteration."""
        return self._of_steps(self._steps(iteration, prompt), iteration, prompt)

    # -- which steps -----------------------------------------------------------------

    def _steps(self, iteration: int, prompt: int) -> Steps:
        """The stochastic steps (of an anchor: those where members act)."""
        spec = self.spec
        size, where = spec.window_size, spec.window_range
        if spec.kind == "ode":
            return ()
        if spec.kind == "all":
            return tuple(range(spec.num_steps))
        if spec.kind in ("subset", "tree"):
            # The image is what the last step predicts, without its noise (DanceGRPO,
            # BranchGRPO: both score and keep that one, and never train that step).
            return tuple(range(spec.num_steps - 1))
        if spec.kind == "branch" and spec.branch_steps:
            return spec.branch_steps
        if spec.kind == "window":
            plan.random_window(spec.num_steps, size, where, 0, 0, 0)  # checks it
            return tuple(range(where[0], where[0] + size))
        if spec.kind == "progressive_window":
            return plan.progressive_window(
                spec.num_steps,
                size,
                where,
                iteration,
                spec.window_every,
                spec.window_decay,
            )
        return plan.random_window(
            spec.num_steps, size, where, spec.seed, iteration, prompt
        )

    def _of_steps(self, steps: Steps, iteration: int, prompt: int) -> Plan:
        spec = self.spec
        count, group = spec.num_steps, spec.group_size
        if spec.kind == "branch":
            # Without a list of steps it is one random window of actions in a row.
            row = () if spec.branch_steps else steps
            return plan.branches(
                count,
                steps[:1] if row else steps,
                group,
                anchors=spec.branch_anchors,
                window=max(1, len(row)),
                merge=spec.merge_steps,
                granularities=spec.granularities,
                whole_anchor=spec.whole_anchor,
            )
        if spec.kind == "tree":
            made = plan.tree(
                count,
                spec.branch_steps,
                spec.fanout,
                steps,
                plan.fraction(count, spec.timestep_fraction)[: count - 1],
            )
            if len(made.leaves) != group:
                raise UserError(
                    f"group_size: {group}: must be {len(made.leaves)}, the leaves of a "
                    f"tree that parts in {spec.fanout} at {spec.branch_steps}"
                )
            return made
        trained = [steps] * group
        if spec.kind == "all":
            trained = [plan.fraction(count, spec.timestep_fraction)] * group
        elif spec.kind == "subset":
            share, seed = spec.timestep_fraction, spec.seed
            trained = [
                plan.random_subset(count, share, seed, iteration, prompt, member)
                for member in range(group)
            ]
        finish: Steps = ()
        if spec.finish_ratio:
            finish = plan.compressed(count, steps[-1] + 1, spec.finish_ratio)
        return plan.chains(
            count,
            steps,
            tuple(trained),
            shared=spec.shared_noise,
            finish=finish,
            probe=spec.probe_steps,
        )

    def _kinds(self) -> list[Plan]:
        """Plans of every size that the run may draw, the largest first."""
        spec = self.spec
        low, high = spec.window_range
        size = spec.window_size
        windows = ("random_window", "progressive_window")
        moves = spec.kind in windows or (
            spec.kind == "branch" and not spec.branch_steps
        )
        if not moves:
            return [self.plan(0, 0)]
        self._steps(0, 0)  # checks the range
        drawn = [
            self._of_steps(tuple(range(start, start + size)), 0, 0)
            for start in range(low, high - size + 1)
        ]
        return sorted(drawn, key=lambda one: -len(one.evaluated))


def steps_in_order(plans: Sequence[Plan]) -> int:
    """Different steps that the actions of a plan begin at; the same for all plans."""
    counts = {len({made.nodes[n].at for n, _ in made.states}) for made in plans}
    if len(counts) != 1:
        raise UserError(
            "train.update_order: steps: needs as many trained steps in every plan"
        )
    return counts.pop()


def rank_of_step(made: Plan) -> list[int]:
    """For every state of the plan, the place of its step among the trained ones."""
    at = [made.nodes[node].at for node, _ in made.states]
    rank = {step: place for place, step in enumerate(sorted(set(at)))}
    return [rank[step] for step in at]
