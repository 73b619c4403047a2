"""From a config and a model to what a run compiles: of a policy, or of pretraining."""

import ml_collections

from flowgrpo_jax.assemble import specs
from flowgrpo_jax.assemble.sampler import check_actions, make_sampler
from flowgrpo_jax.assemble.sizes import Models
from flowgrpo_jax.engine.workload import (
    PolicyWork,
    PretrainingWork,
    Work,
    for_devices,
)
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.rl.objectives.table import PRETRAINING
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.resolution import Size
from flowgrpo_jax.worlds.registry import WORLDS


def pretrains(config: ml_collections.ConfigDict) -> bool:
    """Whether a run learns from scenes, not from rewards."""
    return config.train.objective == PRETRAINING


def make_work(
    config: ml_collections.ConfigDict,
    mesh: meshes.AnyMesh,
    model: FlowModel,
    loaded: Variables,
) -> Work:
    """The workload of a run; `loaded` are the model's variables or their shapes.

    On an abstract mesh all but compiling and running can be asked for.
    """
    if pretrains(config):
        model = for_devices(model, mesh, config.remat)
        sampler = make_sampler(config, model)
        return PretrainingWork(
            specs.learner_spec(config, model, sampler),
            mesh,
            model,
            loaded,
            render=WORLDS[model.name].render,
            scenes_per_iteration=config.prompts_per_iteration,
        )
    return make_policy_work(config, mesh, model, loaded)


def make_works(
    config: ml_collections.ConfigDict,
    mesh: meshes.AnyMesh,
    models: Models,
    loaded: Variables,
) -> dict[Size, PolicyWork]:
    """The workload of a policy at every size; they compile one by one, when first used."""
    return {
        size: make_policy_work(config, mesh, model, loaded)
        for size, model in models.items()
    }


def make_policy_work(
    config: ml_collections.ConfigDict,
    mesh: meshes.AnyMesh,
    model: FlowModel,
    loaded: Variables,
) -> PolicyWork:
    """That of a policy; UserError if a trained step adds no noise."""
    model = for_devices(model, mesh, config.remat)
    keeps = "old_velocity" in specs.fixed_policies(config)
    sampler = make_sampler(config, model, keeps)
    work = PolicyWork(
        specs.learner_spec(config, model, sampler),
        mesh,
        model,
        loaded,
        sampler=sampler,
        plans=specs.plan_spec(config),
        advantage=specs.advantage_spec(config),
        updates=specs.update_spec(config),
        guidance_scale=config.sample.guidance_scale,
    )
    check_actions(sampler, work.planner.kinds)
    return work
