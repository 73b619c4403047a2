"""From the config to the plans of an iteration, packed for the mesh."""

from collections.abc import Sequence

import ml_collections

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing, plan
from flowgrpo_jax.flow.plan import Plan, Steps


class Planner:
    """The plans of a run: which transitions of every prompt are stochastic and trained.

    A pure function of (config, iteration, prompt): a resumed run plans alike.
    """

    def __init__(self, config: ml_collections.ConfigDict, devices: int):
        self._config, self._devices = config, devices
        self.kinds = self._kinds()
        prompts = config.prompts_per_iteration
        # Chunks of prompts are whole packs, and every device should have one of each.
        per_chunk = prompts // config.updates_per_iteration
        most = max(1, per_chunk // devices)
        fitting = max(n for n in range(1, most + 1) if per_chunk % n == 0)
        self.per_pack = packing.jobs_per_pack(self.kinds[0], fitting, config.microbatch)
        self._check_batches(-(-prompts // self.per_pack))
        self._packer = packing.Packer(
            packing.shape_of(self.kinds, self.per_pack, config.microbatch),
            config.microbatch,
        )

    def _check_batches(self, packs: int) -> None:
        batches, each = self._config.reward_batches, -(-packs // self._devices)
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
            for prompt in range(self._config.prompts_per_iteration)
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
        config, sample = self._config, self._config.sample
        size, where = sample.sde_window_size, tuple(sample.sde_window_range)
        if sample.plan == "ode":
            return ()
        if sample.plan == "all":
            return tuple(range(sample.num_steps))
        if sample.plan in ("subset", "tree"):
            # The image is what the last step predicts, without its noise (DanceGRPO,
            # BranchGRPO: both score and keep that one, and never train that step).
            return tuple(range(sample.num_steps - 1))
        if sample.plan == "branch" and sample.branch_steps:
            return tuple(sample.branch_steps)
        if sample.plan == "window":
            plan.random_window(sample.num_steps, size, where, 0, 0, 0)  # checks it
            return tuple(range(where[0], where[0] + size))
        if sample.plan == "progressive_window":
            return plan.progressive_window(
                sample.num_steps,
                size,
                where,
                iteration,
                sample.window_every,
                sample.window_decay,
            )
        return plan.random_window(
            sample.num_steps, size, where, config.seed, iteration, prompt
        )

    def _of_steps(self, steps: Steps, iteration: int, prompt: int) -> Plan:
        config, sample, train = self._config, self._config.sample, self._config.train
        count, group = sample.num_steps, config.group_size
        if sample.plan == "branch":
            # Without a list of steps it is one random window of actions in a row.
            row = () if sample.branch_steps else steps
            return plan.branches(
                count,
                steps[:1] if row else steps,
                group,
                anchors=sample.branch_anchors,
                window=max(1, len(row)),
                merge=tuple(sample.merge_steps),
                granularities=tuple(sample.granularities),
                whole_anchor=sample.whole_anchor,
            )
        if sample.plan == "tree":
            made = plan.tree(
                count,
                tuple(sample.branch_steps),
                sample.fanout,
                steps,
                plan.fraction(count, train.timestep_fraction)[: count - 1],
            )
            if len(made.leaves) != group:
                raise UserError(
                    f"group_size: {group}: must be {len(made.leaves)}, the leaves of a "
                    f"tree that parts in {sample.fanout} at {sample.branch_steps}"
                )
            return made
        trained = [steps] * group
        if sample.plan == "all":
            trained = [plan.fraction(count, train.timestep_fraction)] * group
        elif sample.plan == "subset":
            share, seed = train.timestep_fraction, config.seed
            trained = [
                plan.random_subset(count, share, seed, iteration, prompt, member)
                for member in range(group)
            ]
        finish: Steps = ()
        if sample.finish_ratio:
            finish = plan.compressed(count, steps[-1] + 1, sample.finish_ratio)
        return plan.chains(
            count,
            steps,
            tuple(trained),
            shared=sample.init_noise == "shared",
            finish=finish,
            probe=sample.probe_steps,
        )

    def _kinds(self) -> list[Plan]:
        """Plans of every size that the run may draw, the largest first."""
        sample = self._config.sample
        low, high = sample.sde_window_range
        size = sample.sde_window_size
        windows = ("random_window", "progressive_window")
        moves = sample.plan in windows or (
            sample.plan == "branch" and not sample.branch_steps
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
