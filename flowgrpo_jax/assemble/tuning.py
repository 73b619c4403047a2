"""From a config and the name of chips to the choices that fit them, the cheapest first."""

import ml_collections

from flowgrpo_jax.assemble import sizes, specs
from flowgrpo_jax.assemble.work import make_policy_work
from flowgrpo_jax.config import checks
from flowgrpo_jax.cost import flops, topology, tuning
from flowgrpo_jax.cost.tuning import Candidate, Choice
from flowgrpo_jax.engine.workload import PolicyWork
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes


def candidates(config: ml_collections.ConfigDict, name: str) -> list[Candidate]:
    """All choices with which the config fits these chips by the formulas.

    UserError if there is none; of chips `topology.parse` takes the name.
    """
    chip, devices = topology.parse(name, flops.CHIPS)
    model, shapes = sizes.largest_abstract(config)

    def work_of(microbatch: int, fsdp: int) -> PolicyWork | None:
        chosen = with_choice(config, Choice(microbatch, "none", fsdp, 1))
        mesh = meshes.make_abstract_mesh(specs.mesh_shape(chosen), devices)
        try:
            checks.check(chosen)
            return make_policy_work(chosen, mesh, model, shapes)
        except UserError:  # an objective that takes other microbatches
            return None

    found = tuning.search(
        work_of,
        devices,
        config.group_size,
        config.prompts_per_iteration * config.group_size,
        flops.CHIPS[chip],
        lambda work: topology.paths(name, work.mesh),
    )
    if not found:
        raise UserError(
            f"--tune: {name}: nothing fits by the formulas: take more chips or chips "
            "with more memory, a LoRA or a lower resolution"
        )
    return found


def with_choice(
    config: ml_collections.ConfigDict, choice: Choice
) -> ml_collections.ConfigDict:
    """The config that the choice's flags would make."""
    chosen = config.copy_and_resolve_references()
    chosen.microbatch, chosen.remat = choice.microbatch, choice.remat
    chosen.mesh.data, chosen.mesh.fsdp = -1, choice.fsdp
    chosen.reward_batches = choice.reward_batches
    return chosen
