"""From weights and prompts to images: fixed noise, one program per sampler."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from flowgrpo_jax.engine import programs
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing, plan, rollout
from flowgrpo_jax.models.flow_model import FlowModel, decoding
from flowgrpo_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How images are made, whatever sampler makes them.

    `name` is the model's, for messages; `dtype` that of whole copies of sharded
    parameters: the layers'.
    """

    name: str
    seed: int
    microbatch: int
    dtype: DTypeLike


class Pipeline:
    """Makes images of one list of prompts with any weights of a model.

    Args:
      spec: the seed of the noise and how many images at once.
      variable_specs: the sharding of the weights, as `meshes.specs` gives it.
      texts: the prompts; the table must hold them.
      samplers: by name; each compiles once, when it is first used.
    """

    def __init__(
        self,
        spec: ImageSpec,
        model: FlowModel,
        mesh: jax.sharding.Mesh,
        variable_specs: Any,
        texts: Sequence[str],
        table: TextTable,
        samplers: Mapping[str, rollout.Sampler],
    ):
        self._spec, self._mesh, self._texts = spec, mesh, list(texts)
        self.set_text(table)
        self._decode = programs.make_decode(
            mesh, decoding(variable_specs), model.decode, spec.microbatch
        )
        self._rollouts = {
            name: programs.make_rollout(
                mesh, variable_specs, sampler, model.latent_shape, spec.dtype
            )
            for name, sampler in samplers.items()
        }
        self._plans = {name: _every_step(one) for name, one in samplers.items()}

    def set_text(self, table: TextTable) -> None:
        """Take the prompts' embeddings (again, when the text encoder has moved)."""
        self._text, self._empty = meshes.place(
            (table.rows(self._texts), table.empty), programs.WHOLE, self._mesh
        )

    def images(
        self,
        variables: Any,
        prompt: Int[np.ndarray, " sample"],
        member: Int[np.ndarray, " sample"],
        sampler: str,
    ) -> Float[np.ndarray, "sample height width channel"]:
        """Images in [0, 1] of these prompt numbers and members.

        The noise is a function of (seed, prompt number, member) alone: other weights
        get the same. UserError if the weights give no finite images.
        """
        mesh, spec = self._mesh, self._spec
        one, count = self._plans[sampler], spec.microbatch
        jobs = [
            packing.Job(int(p), one, int(m))
            for p, m in zip(prompt, member, strict=True)
        ]
        packer = packing.Packer(packing.shape_of([one], count, count), count)
        packed = packing.pack_all(packer, jobs, count, mesh.size)
        made = self._rollouts[sampler](
            variables,
            meshes.random_key(mesh, spec.seed),
            meshes.place(packed.tables, programs.PACKS, mesh),
            self._text,
            self._empty,
        )
        decoded = jax.device_get(self._decode(decoding(variables), made.clean))
        images = packing.collect(decoded, packed)[:, 0]
        if not np.isfinite(images).all():
            raise UserError(
                f"model: {spec.name}: its images are not finite: the weights are "
                "damaged or the run has diverged: take earlier ones"
            )
        return images


def _every_step(sampler: rollout.Sampler) -> plan.Plan:
    """One image from its own noise; every step stochastic unless it is the ODE."""
    count = sampler.num_steps
    stochastic = () if sampler.kind == "ode" else tuple(range(count))
    return plan.chains(count, stochastic, ((),))
