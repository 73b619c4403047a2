"""From weights and prompts to images: fixed noise, one program per sampler and size."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import programs
from flowgrpo_jax.engine.text_table import TextTable
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.flow import packing, plan, rollout
from flowgrpo_jax.models.flow_model import FlowModel, decoding
from flowgrpo_jax.runtime import cluster
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.resolution import Size


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


@dataclasses.dataclass(frozen=True)
class Sized:
    """The model at one size, and its samplers by name: sigmas depend on the size."""

    model: FlowModel
    samplers: Mapping[str, rollout.Sampler]


# Numbers of images among those that were asked for, and the images, all of one size.
Part = tuple[Int[np.ndarray, " sample"], Float[np.ndarray, "sample height width 3"]]


class Share(NamedTuple):
    """Images of one size, of which this process holds some.

    `places`: the numbers of all of them among those that were asked for; `own` counts
    within `places`.
    """

    places: Int[np.ndarray, " sample"]
    own: Int[np.ndarray, " own"]
    images: Float[np.ndarray, "own height width 3"]
    decoded: jax.Array
    packed: packing.Packed

    def whole(self) -> Float[np.ndarray, "sample height width 3"] | None:
        """All of them on process 0, and None on others; every process calls it."""
        if self.decoded.is_fully_addressable:
            return self.images
        found = meshes.to_host(self.decoded, keep=cluster.is_first())
        return None if found is None else packing.collect(found, self.packed)[:, 0]


class Pipeline:
    """Makes images of one list of prompts with any weights of a model.

    Args:
      spec: the seed of the noise and how many images at once.
      sized: for every size that the prompts ask for; the first is that of prompts that
        ask for none. Each sampler compiles once a size, when it is first used.
      variable_specs: the sharding of the weights, as `meshes.specs` gives it.
      prompts: the table must hold their texts.
    """

    def __init__(
        self,
        spec: ImageSpec,
        sized: Sequence[Sized],
        mesh: jax.sharding.Mesh,
        variable_specs: Any,
        prompts: Sequence[Prompt],
        table: TextTable,
    ):
        self._spec, self._mesh = spec, mesh
        self._texts = [prompt.text for prompt in prompts]
        self.set_text(table)
        first = sized[0]
        self._sizes = [prompt.size or first.model.size for prompt in prompts]
        # Traced again for latents of another size.
        self._decode = programs.make_decode(
            mesh, decoding(variable_specs), first.model.decode, spec.microbatch
        )
        self._rollouts = {
            (one.model.size, name): programs.make_rollout(
                mesh, variable_specs, sampler, one.model.latent_shape, spec.dtype
            )
            for one in sized
            for name, sampler in one.samplers.items()
        }
        self._plans = {name: _every_step(one) for name, one in first.samplers.items()}

    def set_text(self, table: TextTable) -> None:
        """Take the prompts' embeddings (again, when the text encoder has moved)."""
        self._text, self._empty = meshes.place(
            (table.rows(self._texts), table.empty), programs.WHOLE, self._mesh
        )

    def by_size(
        self, prompt: Int[np.ndarray, " sample"]
    ) -> list[Int[np.ndarray, " _"]]:
        """Which of these prompt numbers are of one size, size after size."""
        found: dict[Size, list[int]] = {}
        for place, number in enumerate(prompt):
            found.setdefault(self._sizes[number], []).append(place)
        return [np.array(places) for places in found.values()]

    def parts(
        self,
        variables: Any,
        prompt: Int[np.ndarray, " sample"],
        member: Int[np.ndarray, " sample"],
        sampler: str,
    ) -> Iterator[Part]:
        """The images of these prompt numbers and members, those of one size at a time."""
        for places in self.by_size(prompt):
            of_size = prompt[places], member[places]
            yield places, self.images(variables, *of_size, sampler)

    def shares(
        self,
        variables: Any,
        prompt: Int[np.ndarray, " sample"],
        member: Int[np.ndarray, " sample"],
        sampler: str,
    ) -> Iterator[Share]:
        """As `parts`, but each process has the images that its devices made."""
        for places in self.by_size(prompt):
            of_size = prompt[places], member[places]
            decoded, packed = self._made(variables, *of_size, sampler)
            rows, values = meshes.own_rows(decoded)
            own, images = packing.collect_some(values, packed, rows)
            yield Share(places, own, self._finite(images[:, 0]), decoded, packed)

    def images(
        self,
        variables: Any,
        prompt: Int[np.ndarray, " sample"],
        member: Int[np.ndarray, " sample"],
        sampler: str,
    ) -> Float[np.ndarray, "sample height width channel"]:
        """Images in [0, 1] of prompt numbers of one size, and members.

        The noise is a function of (seed, prompt number, member) alone: other weights
        get the same. UserError if the weights give no finite images.
        """
        decoded, packed = self._made(variables, prompt, member, sampler)
        return self._finite(packing.collect(meshes.to_host(decoded), packed)[:, 0])

    def _made(
        self, variables: Any, prompt: np.ndarray, member: np.ndarray, sampler: str
    ) -> tuple[jax.Array, packing.Packed]:
        """Decoded images [pack, job, ...] on the mesh, and how they are packed."""
        [size] = {self._sizes[number] for number in prompt}
        mesh, spec = self._mesh, self._spec
        one, count = self._plans[sampler], spec.microbatch
        jobs = [
            packing.Job(int(p), one, int(m))
            for p, m in zip(prompt, member, strict=True)
        ]
        packer = packing.Packer(packing.shape_of([one], count, count), count)
        packed = packing.pack_all(packer, jobs, count, mesh.size)
        made = self._rollouts[size, sampler](
            variables,
            meshes.random_key(mesh, spec.seed),
            meshes.place(packed.tables, programs.PACKS, mesh),
            self._text,
            self._empty,
        )
        return self._decode(decoding(variables), made.clean), packed

    def _finite(self, images: np.ndarray) -> np.ndarray:
        if not np.isfinite(images).all():
            raise UserError(
                f"model: {self._spec.name}: its images are not finite: the weights are "
                "damaged or the run has diverged: take earlier ones"
            )
        return images


def _every_step(sampler: rollout.Sampler) -> plan.Plan:
    """One image from its own noise; every step stochastic unless it is the ODE."""
    count = sampler.num_steps
    stochastic = () if sampler.kind == "ode" else tuple(range(count))
    return plan.chains(count, stochastic, ((),))
