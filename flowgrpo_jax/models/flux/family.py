"""FLUX.1 as a FlowModel: from a diffusers folder, and back to one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flowgrpo_jax.models import vae
from flowgrpo_jax.models.diffusers_code import (
    Classes,
    DiffusersCode,
    check_latents,
    latent_shape,
    picture_size,
)
from flowgrpo_jax.models.files import scheduler, tensors
from flowgrpo_jax.models.files.original_names import OriginalNames
from flowgrpo_jax.models.flow_model import FlowModel
from flowgrpo_jax.models.flux import folder as flux_folder
from flowgrpo_jax.models.flux import original_names, presets, transformer_config
from flowgrpo_jax.models.flux.denoiser import FluxDenoiser
from flowgrpo_jax.models.flux.prompts import FluxPromptEncoders
from flowgrpo_jax.models.flux.transformer_config import PATCH, FluxConfig
from flowgrpo_jax.models.spec import ModelSpec

_OWN_RESOLUTION = 1024  # what FluxPipeline draws if it is told nothing
_MOST = 4096  # rotary positions have no end; a latent of 512 x 512 has


class FluxCode(DiffusersCode):
    """The family's code; see `family.Code` for what each method is."""

    classes = Classes("FluxPipeline", "FluxTransformer2DModel")
    aliases = presets.HUB_IDS

    def plan(self, spec: ModelSpec, place: Path | None) -> FlowModel:
        """The networks that a folder describes, without weights.

        Without a folder `name` is one of `presets.TRANSFORMERS`, as it was released.
        """
        if place is None:
            config = FluxConfig.from_dict(presets.TRANSFORMERS[spec.name])
            coder, prompts = vae.FLUX, None
        else:
            flux_folder.check_index(place)
            config = FluxConfig.from_folder(self.config_folder(spec, place))
            coder = vae.VAEConfig.from_folder(place / "vae")
            kind = jnp.dtype(spec.dtype).name
            prompts = FluxPromptEncoders(str(place), spec.max_sequence_length, kind)
        check_latents((config.latent_channels,) * 2, coder, place)
        step = coder.downscale * PATCH
        size = picture_size(spec.resolution, _OWN_RESOLUTION, step, _MOST)
        network = FluxDenoiser(config).with_options(
            lora_rank=spec.lora_rank,
            lora_alpha=spec.lora_alpha,
            lora_targets=spec.lora_targets or None,
            dtype=jnp.dtype(spec.dtype),
        )
        tokens = (size.height // step) * (size.width // step)
        if place is None:
            held = presets.SCHEDULERS[spec.name]
            shift = scheduler.read_shift(held, tokens, f"model: {spec.name}: scheduler")
        else:
            shift = scheduler.shift(place, tokens)
        return FlowModel(
            name=spec.name,
            denoiser=network,
            autoencoder=vae.VAE(coder),
            latent_shape=latent_shape(size, coder, config.latent_channels),
            text_tokens=spec.max_sequence_length,
            prompts=prompts,
            # The pipeline gives the scheduler its sigmas: from 1 to 1 / num_steps.
            shift=dataclasses.replace(shift, steps="even"),
            transformer_path=spec.transformer_path,
        )

    def table(self, model: FlowModel) -> tensors.Table:
        return transformer_config.table(_config(model))

    def original_names(self, model: FlowModel) -> OriginalNames:
        del model  # the same whatever the sizes
        return original_names.NAMES

    def config_json(self, model: FlowModel) -> dict[str, Any]:
        config, names = _config(model), transformer_config.file_fields()
        values = {name: getattr(config, name) for name in names}
        return values | {"axes_dims_rope": list(config.axes_dims_rope)}


def _config(model: FlowModel) -> FluxConfig:
    assert isinstance(model.denoiser, FluxDenoiser)
    return model.denoiser.config


CODE = FluxCode()
