"""The embedded worlds as a family of models; weights are one file, ours or a user's."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files.lora_files import Adapter
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.spec import ModelSpec
from flowgrpo_jax.runtime import paths, resolution
from flowgrpo_jax.worlds import embedded
from flowgrpo_jax.worlds.registry import WORLDS


class EmbeddedCode:
    """The code of this family; `models.family.Code` says what each method does."""

    def find(self, spec: ModelSpec) -> Path:
        """The weights file of a world, or the file of that name; UserError for none."""
        name = spec.name
        own = WORLDS[name].model.WEIGHTS if name in WORLDS else name
        path = paths.local(spec.path or own)
        if not path.is_file():
            remedy = "install the package again" if name in WORLDS else "give a file"
            raise UserError(f"model: {name}: no weights at {path}: {remedy}")
        return path

    def plan(self, spec: ModelSpec, place: Path | None) -> FlowModel:
        """The networks in the file's size or, without a file, in a world's default size."""
        if place is None:
            return _of_size(spec, WORLDS[spec.name].model.Size())
        try:
            return _of_size(spec, embedded.read_size(place))
        except (TypeError, KeyError) as error:  # the header describes something else
            raise _no_weights_of_ours(spec.name) from error

    def shapes(self, model: FlowModel, weights: DTypeLike) -> Variables:
        """Shapes of all variables, always in fp32: the file holds nothing else."""
        del weights
        return jax.eval_shape(model.init, jax.random.key(0))

    def read(self, place: Path, model: FlowModel, like: Variables) -> Variables:
        """The variables on the host, in fp32; they are small enough for that."""
        try:
            variables, _ = embedded.load(place)
        except (TypeError, KeyError) as error:
            raise _no_weights_of_ours(str(place)) from error
        if jax.tree.map(jnp.shape, like) != jax.tree.map(jnp.shape, variables):
            raise _no_weights_of_ours(str(place))
        return variables

    def with_adapter(self, path: str, lora: Variables, model: FlowModel) -> Variables:
        """UserError: adapter files belong to models of diffusers."""
        raise UserError(
            f"train.lora_path: {path}: needs train.use_lora and a diffusers model"
        )

    def save_result(self, path: Path, variables: Variables, model: FlowModel) -> None:
        """One file, weights.safetensors, with any LoRA folded in."""
        embedded.save(path / "weights.safetensors", jax.device_get(variables), model)

    def adapter(self, variables: Variables, model: FlowModel) -> Adapter:
        """UserError: diffusers has no model to which an adapter could be applied."""
        raise _not_of_diffusers(model)

    def write_transformer(
        self, folder: Path, variables: Variables, model: FlowModel
    ) -> None:
        """UserError: diffusers has no such transformer."""
        raise _not_of_diffusers(model)

    def usage(self, base: str | None, transformer: bool) -> str:
        """The command with which this package samples the result."""
        return "python -m flowgrpo_jax.sample --model=weights.safetensors --prompt=..."


def _of_size(spec: ModelSpec, size: embedded.Size) -> FlowModel:
    model = WORLDS[size.world].model.make_model(
        size, spec.lora_rank, spec.lora_alpha, jnp.dtype(spec.dtype)
    )
    if resolution.parse(spec.resolution) not in (None, model.size):
        raise UserError(
            f"resolution: {spec.resolution}: must be 0 or {model.size}, the one size of "
            f"the embedded model {size.world}"
        )
    if spec.transformer_path:
        raise UserError(
            f"transformer_path: {spec.transformer_path}: the embedded model is one file: "
            "give that as model"
        )
    network = model.denoiser.with_options(lora_targets=spec.lora_targets or None)
    return dataclasses.replace(model, denoiser=network)


def _not_of_diffusers(model: FlowModel) -> UserError:
    return UserError(
        f"model: {model.name}: the embedded model is no diffusers model: its result is "
        "weights.safetensors in the run's --workdir"
    )


def _no_weights_of_ours(name: str) -> UserError:
    return UserError(
        f"model: {name}: holds other weights than those of an embedded model: give "
        "a weights.safetensors that this package has written"
    )


CODE = EmbeddedCode()
