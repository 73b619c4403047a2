"""What is alike for all families whose models are folders of diffusers."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import lora as loras
from flowgrpo_jax.models import vae
from flowgrpo_jax.models.denoiser import LatentShape
from flowgrpo_jax.models.files import (
    hub,
    lora_files,
    lora_reading,
    single_files,
    tensors,
)
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.files.original_names import OriginalNames
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.spec import ModelSpec
from flowgrpo_jax.runtime import paths
from flowgrpo_jax.runtime import resolution as resolutions
from flowgrpo_jax.runtime.resolution import Resolution, Size


class Classes(NamedTuple):
    """Names of diffusers' classes, for messages and for the code on a model card."""

    pipeline: str
    transformer: str


class DiffusersCode:
    """The half of `family.Code` that needs a rename table and the names of classes.

    A family adds `plan`, `table` and `original_names`, and what its transformer has
    beside parameters.
    """

    classes: Classes
    aliases: Mapping[str, str]

    def table(self, model: FlowModel) -> tensors.Table:
        """The rename table of the transformer's file."""
        raise NotImplementedError

    def original_names(self, model: FlowModel) -> OriginalNames:
        """The names of its tensors in the checkpoint as it was first released."""
        raise NotImplementedError

    def config_json(self, model: FlowModel) -> dict[str, Any]:
        """What the transformer's config.json must say, but its class."""
        raise NotImplementedError

    def find(self, spec: ModelSpec) -> Path:
        """The diffusers folder of a model; what is not here is downloaded."""
        return hub.folder(spec.place, self.aliases, not spec.transformer_path)

    def config_folder(self, spec: ModelSpec, place: Path) -> Path:
        """Whose config.json the transformer has: that of its own folder, if any."""
        own = paths.local(spec.transformer_path)
        given = spec.transformer_path and (own / "config.json").is_file()
        return own if given else place / "transformer"

    def source(
        self, place: Path, model: FlowModel, like: Variables
    ) -> single_files.Source:
        """Where the tensors of the transformer are; `like`: the shapes of variables."""
        if not model.transformer_path:
            return single_files.Source(place / "transformer", self.table(model))
        path, table = paths.local(model.transformer_path), self.table(model)
        trees = [like[name] for name in ("transformer", "buffers") if name in like]
        return single_files.source(path, table, self.original_names(model), trees)

    def shapes(self, model: FlowModel, weights: DTypeLike) -> Variables:
        """Shapes of all variables; `weights` is the type of the transformer's."""
        network, coder = model.denoiser.with_options(lora_rank=0), model.autoencoder
        assert isinstance(coder, vae.VAE)
        found = jax.eval_shape(
            lambda key: network.init(key, model.latent_shape), jax.random.key(0)
        )
        made = {
            "transformer": jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(weights)),
                found["params"],
            ),
            "vae": coder.shapes(),
        }
        return made | {
            name: tree for name, tree in found.items() if name not in ("params", "lora")
        }

    def read(self, place: Path, model: FlowModel, like: Variables) -> Variables:
        """The variables of a folder, in the types and at the places of `like`."""
        source, buffers = self.source(place, model, like), {}
        if source.others:
            print(
                f"transformer_path: {source.path}: {', '.join(source.others)}: not read: "
                f"autoencoder and text encoders are those of {place}",
                file=sys.stderr,
            )
        if "buffers" in like:
            buffers["buffers"] = source.read(like["buffers"], alone=False)
        return buffers | {
            "transformer": source.read(like["transformer"], like.get("buffers")),
            "vae": tensors.read(place / "vae", vae.TABLE, like["vae"]),
        }

    def save_result(self, path: Path, variables: Variables, model: FlowModel) -> None:
        """The LoRA of a run as pytorch_lora_weights.safetensors, or its transformer."""
        if "lora" in variables:
            lora_files.write_diffusers(path, self.adapter(variables, model))
        else:
            self.write_transformer(path / "transformer", variables, model)

    def adapter(self, variables: Variables, model: FlowModel) -> lora_files.Adapter:
        """The LoRA of a policy, under the names of diffusers."""
        lora = jax.device_get(variables["lora"])
        alpha = model.denoiser.lora_alpha
        return lora_files.from_variables(lora, self.table(model), alpha)

    def with_adapter(self, path: str, lora: Variables, model: FlowModel) -> Variables:
        """A fresh `lora` tree with the weights of a LoRA file or folder in it."""
        alpha = model.denoiser.lora_alpha
        layers = lora_reading.read(path, self.layer_names(model))
        return lora_files.to_variables(layers, lora, self.table(model), alpha)

    def layer_names(self, model: FlowModel) -> LayerNames:
        """All names by which a LoRA file may call the transformer's linear layers."""
        like = self.shapes(model, jnp.float32)["transformer"]
        shapes = {
            name.removesuffix(".weight"): shape
            for name, shape in tensors.names(self.table(model), like).items()
            if name.endswith(".weight") and len(shape) == 2
        }
        return LayerNames(shapes, self.original_names(model))

    def write_transformer(
        self, folder: Path, variables: Variables, model: FlowModel
    ) -> None:
        """The transformer as a diffusers folder, any LoRA folded in."""
        held = {"_class_name": self.classes.transformer, **self.config_json(model)}
        tensors.write(folder, self.folded(variables, model), self.table(model), held)

    def folded(self, variables: Variables, model: FlowModel) -> Variables:
        """All that the transformer's file holds, on the host."""
        alpha = model.denoiser.lora_alpha
        return loras.fold(jax.device_get(variables), alpha)["transformer"]

    def usage(self, base: str | None, transformer: bool) -> str:
        """Code for diffusers that loads a result, in the folder of the model card."""
        pipeline, network = self.classes
        where = f'"{base}"' if base else "...  # the folder of the base model"
        if transformer:
            return f"""from diffusers import {network}, {pipeline}

base = {where}
transformer = {network}.from_pretrained("transformer")
pipeline = {pipeline}.from_pretrained(base, transformer=transformer)"""
        return f"""from diffusers import {pipeline}

base = {where}
pipeline = {pipeline}.from_pretrained(base)
pipeline.load_lora_weights(".")"""


def picture_size(resolution: Resolution, own: int, step: int, most: int) -> Size:
    """Height and width in pixels; `own` is a side of the square that the model draws.

    UserError for sides that are no multiples of `step`, or above `most`.
    """
    size = resolutions.parse(resolution) or Size(own, own)
    if any(side % step or side > most for side in size):
        raise UserError(
            f"resolution: {resolution}: must be 0 (the model's own, {own}) or multiples "
            f"of {step}, at most {most}"
        )
    return size


def latent_shape(size: Size, coder: vae.VAEConfig, channels: int) -> LatentShape:
    """Height, width and channels of the latents of pictures of this size."""
    return size.height // coder.downscale, size.width // coder.downscale, channels


def check_latents(
    channels: tuple[int, int], coder: vae.VAEConfig, folder: Path | None
) -> None:
    """UserError for a transformer and an autoencoder that do not fit together.

    `channels`: of the latents that the transformer takes and gives.
    """
    if channels != (coder.latent_channels,) * 2:
        raise UserError(
            f"model: {folder}: transformer/config.json: in_channels and out_channels: "
            f"{channels[0]} and {channels[1]}: latents of the vae have "
            f"{coder.latent_channels}"
        )
    if (coder.in_channels, coder.out_channels) != (3, 3):
        raise UserError(
            f"model: {folder}: vae/config.json: in_channels and out_channels: must be 3"
        )
