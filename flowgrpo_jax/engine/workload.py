"""What a run puts on the mesh, from its config and the shapes of its variables alone.

`train` lays weights under it; `estimate` compiles it for chips that are not there.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from flowgrpo_jax import assemble
from flowgrpo_jax.assemble.planner import Planner
from flowgrpo_jax.engine import credit, programs
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
from flowgrpo_jax.rl import update as rl_update
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from flowgrpo_jax.rl.update import Entries
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.worlds.registry import WORLDS


class Workload:
    """Roles of the variables, their shardings, and the compiled programs of a run."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: meshes.AnyMesh,
        model: FlowModel,
        loaded: Variables,
    ):
        """`loaded`: the model's variables, or their shapes (jax.ShapeDtypeStruct).

        On an abstract mesh all but compiling and running can be asked for.
        """
        self.config, self.mesh = config, mesh
        self.model = _for_devices(model, config, mesh)
        self.pretraining = config.train.objective == "flow_matching"
        self.needs = assemble.fixed_policies(config)
        self.behaviour = assemble.make_behaviour(config)
        self.objective = OBJECTIVES[config.train.objective]
        self.learns_from_samples = self.objective.consumes == "samples"
        self.optimizer = rl_update.make_optimizer(
            learning_rate(config),
            max_grad_norm=config.train.max_grad_norm,
            weight_decay=config.train.weight_decay,
            eps=config.train.adam_eps,
            name=config.train.optimizer,
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
        self._set_up_shapes(shapes)
        self._set_up_programs()

    def _set_up_shapes(self, loaded: Variables) -> None:
        self.trainable = jax.eval_shape(
            lambda variables: assemble.trainable_part(
                self.config, self.model, variables
            ),
            loaded,
        )
        self.frozen = self.frozen_part(loaded, self.trainable)
        self.state = jax.eval_shape(self._init_state, self.trainable)
        # Moments carry the names of their parameters, so the same rules place them.
        self.trainable_specs, self.frozen_specs, self.state_specs = (
            meshes.specs(tree, self.model.denoiser.sharding_rules, self.mesh)
            for tree in (self.trainable, self.frozen, self.state)
        )
        self.variables_specs = overlay(self.frozen_specs, self.trainable_specs)

    def _set_up_programs(self) -> None:
        config, model, mesh = self.config, self.model, self.mesh
        sampler = assemble.make_sampler(config, model, "old_velocity" in self.needs)
        if self.pretraining:
            self.world = WORLDS[model.name]
            self.encode = programs.make_scene_encoder(
                mesh, lambda scenes: model.encode({}, self.world.render(scenes))
            )
        else:
            self.planner = Planner(config, mesh.size)
            assemble.check_actions(sampler, self.planner.kinds)
            self.rollout = programs.make_rollout(
                mesh,
                self.variables_specs,
                sampler,
                model.latent_shape,
                jnp.dtype(config.dtype),
            )
            self.join = programs.make_join(mesh)
            self.decode = programs.make_decode(
                mesh, decoding(self.frozen_specs), model.decode, config.microbatch
            )
        self.update = programs.make_update(
            mesh,
            self.state_specs,
            self.frozen_specs,
            assemble.make_loss(config, model, sampler),
            self.needs,
            (
                programs.fetch_samples
                if self.learns_from_samples
                else programs.fetch_transitions
            ),
            self.optimizer,
            rl_update.Ema(config.train.ema_decay, config.train.ema_every),
            self.behaviour,
            jnp.dtype(config.dtype),
        )

    # -- variables -------------------------------------------------------------------

    def frozen_part(self, loaded: Variables, trainable: Variables) -> Variables:
        """What does not move: all, where the loss compares with it, or the rest."""
        return loaded if "frozen" in self.needs else without(loaded, trainable)

    def initial_state(self, trainable: Variables) -> rl_update.TrainState:
        """The state before the first iteration, on the mesh, from placed variables."""
        out = meshes.shardings(self.state_specs, self.mesh)
        return jax.jit(self._init_state, out_shardings=out)(trainable)

    def _init_state(self, part: Variables) -> rl_update.TrainState:
        return rl_update.init_state(part, self.optimizer, self.behaviour is not None)

    # -- one iteration -----------------------------------------------------------------

    def sampling_part(self, state: rl_update.TrainState) -> Any:
        """The trainable variables of the policy that samples."""
        behind = self.behaviour is not None and self.behaviour.samples
        return state.behaviour if behind else state.trainable

    def pool(self, made: Any) -> Any:
        """The part of a rollout that the update learns from."""
        return made.clean if self.learns_from_samples else made.transitions

    def entries(self, jobs, packed, leaves, measured) -> tuple[Any, dict[str, float]]:
        """What the update learns from, on the host, and metrics of the groups."""
        config, devices = self.config, self.mesh.size
        if not self.learns_from_samples:
            edges, stats = credit.of_actions(config, measured, jobs, leaves)
            entries = credit.action_entries(config, jobs, packed, edges, devices)
            return entries, stats
        advantages, stats = credit.of_samples(config, measured, leaves)
        by_prompt = (len(jobs), -1)
        entries = credit.sample_entries(
            config,
            packed,
            np.where(leaves.credited, measured["avg"], np.nan).reshape(by_prompt),
            advantages.reshape(by_prompt),
            self.objective.grouping,
            devices,
        )
        return entries, stats

    def first_iteration(self) -> tuple[Sequence[Job], Packed, Entries]:
        """The plans of iteration 0 and its entries, had all images other rewards."""
        jobs = self.planner.jobs(0)
        packed = self.planner.pack(jobs)
        leaves = credit.leaves_of(jobs, self.config.train.advantage_key)
        scores = np.random.default_rng(0).normal(size=len(leaves.prompt))
        measured = dict.fromkeys([*self.config.reward, "avg"], scores)
        return jobs, packed, self.entries(jobs, packed, leaves, measured)[0]

    def resident(self) -> tuple[Variables, rl_update.TrainState]:
        """Shapes of what stays on the mesh: frozen variables and training state."""
        frozen = self._placed(self.frozen, self.frozen_specs)
        return frozen, self._placed(self.state, self.state_specs)

    def arguments(self) -> dict[str, tuple]:
        """Abstract arguments of rollout, decode and update, placed as in a run."""
        jobs, packed, entries = self.first_iteration()
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
        split = self._placed(entries, programs.SPLIT)
        return {
            "rollout": rollout,
            "decode": (decoding(frozen), made.clean),
            "update": (state, frozen, self.pool(made), split, key, table, empty),
        }

    def _placed(self, tree: Any, spec: Any = programs.WHOLE) -> Any:
        return meshes.abstract(tree, spec, self.mesh)


def _for_devices(
    model: FlowModel, config: ml_collections.ConfigDict, mesh: meshes.AnyMesh
) -> FlowModel:
    """The network with the attention of these devices and the config's policy."""
    network = model.denoiser
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
    kind = attention.choose(device, network.dtype, network.head_dim)
    chosen = network.with_options(attention=kind, remat=config.remat)
    return dataclasses.replace(model, denoiser=chosen)


def _rows(text: TextEmbedding, count: int) -> TextEmbedding:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), text
    )


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Warm-up, constant, linear decay to zero; all given in iterations."""
    rate, updates = config.train.learning_rate, config.updates_per_iteration
    warmup = config.train.warmup_iterations * updates
    decay = config.train.decay_iterations * updates
    total = config.num_iterations * updates
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0 if warmup else rate, rate, max(warmup, 1)),
            optax.linear_schedule(rate, 0.0 if decay else rate, max(decay, 1)),
        ],
        [total - decay],
    )
