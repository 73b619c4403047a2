"""What a run puts on the mesh, from specs and the shapes of its variables alone.

A run lays weights under it; `estimate` compiles it for chips that are not there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flowgrpo_jax.engine import credit, programs
from flowgrpo_jax.engine.credit import Leaves, UpdateSpec
from flowgrpo_jax.engine.planner import Planner, PlanSpec
from flowgrpo_jax.flow import rollout
from flowgrpo_jax.flow.packing import Job, Packed
from flowgrpo_jax.models import attention
from flowgrpo_jax.models.flow_model import (
    FlowModel,
    Variables,
    decoding,
    overlay,
    without,
)
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.rl import losses
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.rl.advantage import AdvantageSpec
from flowgrpo_jax.rl.update import UpdateBatch
from flowgrpo_jax.runtime import mesh as meshes


def for_devices(model: FlowModel, mesh: meshes.AnyMesh, remat: str) -> FlowModel:
    """The network with the attention of these devices and a policy of `remat`."""
    network = model.denoiser
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
    kind = attention.choose(device, network.dtype, network.head_dim)
    chosen = network.with_options(attention=kind, remat=remat)
    return dataclasses.replace(model, denoiser=chosen)


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
    """What learns, from what, and how far.

    `needs`: the fixed policies that the loss reads, as `losses.needs` gives them.
    `consumes`, `grouping`: those of the objective's row. `trainable_part`: the
    variables that move, of all (or of their shapes); `partly`: whether these are not
    the whole transformer. `guidance_scale` is that of the loss.
    """

    loss: losses.Loss
    needs: frozenset[str]
    consumes: Literal["transitions", "samples"]
    grouping: str
    trainable_part: Callable[[Variables], Variables]
    partly: bool
    optimizer: rl_update.OptimizerSpec
    ema: rl_update.Ema
    behaviour: rl_update.Behaviour | None
    guidance_scale: float
    microbatch: int
    dtype: DTypeLike  # of whole copies of sharded parameters: that of the layers
    exact: bool = False  # gradients are the same on any mesh


class Learner:
    """Roles of the variables, their shardings, and the compiled update of a run."""

    def __init__(
        self,
        spec: LearnerSpec,
        mesh: meshes.AnyMesh,
        model: FlowModel,
        loaded: Variables,
    ):
        """`loaded`: the model's variables, or their shapes (jax.ShapeDtypeStruct).

        On an abstract mesh all but compiling and running can be asked for.
        """
        self.learner, self.mesh, self.model = spec, mesh, model
        self.needs, self.behaviour = spec.needs, spec.behaviour
        self.learns_from_samples = spec.consumes == "samples"
        self.optimizer = rl_update.make_optimizer(spec.optimizer)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
        self.trainable = jax.eval_shape(spec.trainable_part, shapes)
        self.frozen = self.frozen_part(shapes, self.trainable)
        self.state = jax.eval_shape(self._init_state, self.trainable)
        # Moments carry the names of their parameters, so the same rules place them. To
        # be exact what learns is whole everywhere: a norm over parts rounds in parts.
        learns = () if spec.exact else model.denoiser.sharding_rules
        self.trainable_specs, self.frozen_specs, self.state_specs = (
            meshes.specs(tree, rules, mesh)
            for tree, rules in (
                (self.trainable, learns),
                (self.frozen, model.denoiser.sharding_rules),
                (self.state, learns),
            )
        )
        self.variables_specs = overlay(self.frozen_specs, self.trainable_specs)
        from_samples = self.learns_from_samples
        self.update = programs.make_update(
            mesh,
            self.state_specs,
            self.frozen_specs,
            spec.loss,
            spec.needs,
            programs.fetch_samples if from_samples else programs.fetch_transitions,
            self.optimizer,
            spec.ema,
            spec.behaviour,
            spec.dtype,
            spec.exact,
        )

    def frozen_part(self, loaded: Variables, trainable: Variables) -> Variables:
        """What does not move: all, where the loss compares with it, or the rest."""
        return loaded if "frozen" in self.needs else without(loaded, trainable)

    def initial_state(self, trainable: Variables) -> rl_update.TrainState:
        """The state before the first iteration, on the mesh, from placed variables."""
        out = meshes.shardings(self.state_specs, self.mesh)
        return jax.jit(self._init_state, out_shardings=out)(trainable)

    def _init_state(self, part: Variables) -> rl_update.TrainState:
        return rl_update.init_state(part, self.optimizer, self.behaviour is not None)

    def resident(self) -> tuple[Variables, rl_update.TrainState]:
        """Shapes of what stays on the mesh: frozen variables and training state."""
        frozen = self._placed(self.frozen, self.frozen_specs)
        return frozen, self._placed(self.state, self.state_specs)

    def place(self, tree: Any, spec: Any = programs.WHOLE) -> Any:
        """Host arrays on the mesh."""
        return meshes.place(tree, spec, self.mesh)

    def _placed(self, tree: Any, spec: Any = programs.WHOLE) -> Any:
        return meshes.abstract(tree, spec, self.mesh)


class PolicyWork(Learner):
    """A policy that samples, is rewarded, and learns: plans and all three programs."""

    def __init__(
        self,
        spec: LearnerSpec,
        mesh: meshes.AnyMesh,
        model: FlowModel,
        loaded: Variables,
        *,
        sampler: rollout.Sampler,
        plans: PlanSpec,
        advantage: AdvantageSpec,
        updates: UpdateSpec,
        guidance_scale: float,
    ):
        """See `Learner`; `guidance_scale` is that of sampling."""
        super().__init__(spec, mesh, model, loaded)
        self.advantage, self.updates = advantage, updates
        self.guidance_scale, self.sampler = guidance_scale, sampler
        self.planner = Planner(plans, mesh.size)
        self.rollout = programs.make_rollout(
            mesh, self.variables_specs, sampler, model.latent_shape, spec.dtype
        )
        self.join = programs.make_join(mesh)
        self.decode = programs.make_decode(
            mesh, decoding(self.frozen_specs), model.decode, spec.microbatch
        )

    def sampling_part(self, state: rl_update.TrainState) -> Any:
        """The trainable variables of the policy that samples."""
        behind = self.behaviour is not None and self.behaviour.samples
        return state.behaviour if behind else state.trainable

    def experience(self, made: Any) -> Any:
        """The part of a rollout that the update learns from."""
        return made.clean if self.learns_from_samples else made.transitions

    def leaves(self, jobs: Sequence[Job]) -> Leaves:
        """The images of these plans, and what each is compared with."""
        return credit.leaves_of(jobs, self.advantage.key)

    def update_batch(
        self,
        jobs: Sequence[Job],
        packed: Packed,
        leaves: Leaves,
        measured: Mapping[str, np.ndarray],
    ) -> tuple[UpdateBatch, dict[str, float]]:
        """What the update learns from, on the host, and metrics of the groups."""
        devices = self.mesh.size
        if not self.learns_from_samples:
            edges, stats = credit.of_actions(self.advantage, measured, jobs, leaves)
            update_batch = credit.batch_of_actions(
                self.updates, jobs, packed, edges, devices
            )
            return update_batch, stats
        advantages, stats = credit.of_samples(self.advantage, measured, leaves)
        by_prompt = (len(jobs), -1)
        update_batch = credit.batch_of_samples(
            self.updates,
            packed,
            np.where(leaves.credited, measured["avg"], np.nan).reshape(by_prompt),
            advantages.reshape(by_prompt),
            self.learner.grouping,
            devices,
        )
        return update_batch, stats

    def first_iteration(self) -> tuple[Sequence[Job], Packed, UpdateBatch]:
        """The plans of iteration 0 and its entries, had all images other rewards."""
        jobs = self.planner.jobs(0)
        packed = self.planner.pack(jobs)
        leaves = self.leaves(jobs)
        scores = np.random.default_rng(0).normal(size=len(leaves.prompt))
        measured = dict.fromkeys([*self.advantage.weights, "avg"], scores)
        return jobs, packed, self.update_batch(jobs, packed, leaves, measured)[0]

    def arguments(self) -> dict[str, tuple]:
        """Abstract arguments of rollout, decode and update, placed as in a run."""
        jobs, packed, update_batch = self.first_iteration()
        frozen, state = self.resident()
        text = self.model.text_shape()
        key = self._placed(jax.eval_shape(jax.random.key, 0))
        empty = self._placed(_rows(text, 1))
        table = self._placed(_rows(text, len(jobs)))
        tables = self._placed(packed.tables, programs.PACKS)
        rollout = (
            overlay(frozen, self.sampling_part(state)),
            key,
            tables,
            table,
            empty,
        )
        made = self._placed(jax.eval_shape(self.rollout, *rollout), programs.PACKS)
        split = self._placed(update_batch, programs.SPLIT)
        return {
            "rollout": rollout,
            "decode": (decoding(frozen), made.clean),
            "update": (state, frozen, self.experience(made), split, key, table, empty),
        }


class PretrainingWork(Learner):
    """A model that learns captioned scenes: they are painted, encoded and matched."""

    def __init__(
        self,
        spec: LearnerSpec,
        mesh: meshes.AnyMesh,
        model: FlowModel,
        loaded: Variables,
        *,
        render: Callable[[Any], jax.Array],
        scenes_per_iteration: int,
    ):
        """See `Learner`; `render` paints scenes as images."""
        super().__init__(spec, mesh, model, loaded)
        self.scenes_per_iteration = scenes_per_iteration
        self.encode = programs.make_scene_encoder(
            mesh, lambda scenes: model.encode({}, render(scenes))
        )


Work = PolicyWork | PretrainingWork


def _rows(text: TextEmbedding, count: int) -> TextEmbedding:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), text
    )
