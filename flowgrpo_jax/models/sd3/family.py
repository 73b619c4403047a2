"""Stable Diffusion 3 as a FlowModel: from a diffusers folder, and back to one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from flowgrpo_jax.models.flow_model import FlowModel, Shift, Variables, overlay
from flowgrpo_jax.models.folder_encoders import CLIP_TOKENS
from flowgrpo_jax.models.sd3 import folder as sd3_folder
from flowgrpo_jax.models.sd3 import original_names, presets, transformer_config
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.prompts import SD3PromptEncoders
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig
from flowgrpo_jax.models.spec import ModelSpec


class SD3Code(DiffusersCode):
    """The family's code; see `family.Code` for what each method is."""

    classes = Classes("StableDiffusion3Pipeline", "SD3Transformer2DModel")
    aliases = presets.HUB_IDS

    def plan(self, spec: ModelSpec, place: Path | None) -> FlowModel:
        """The networks that a folder describes, without weights.

        Without a folder `name` is one of `presets.TRANSFORMERS`, as it was released.
        """
        if place is None:
            config = MMDiTConfig.from_dict(presets.TRANSFORMERS[spec.name])
            coder, prompts = vae.SD3, None
        else:
            sd3_folder.check_index(place)
            config = MMDiTConfig.from_folder(self.config_folder(spec, place))
            coder = vae.VAEConfig.from_folder(place / "vae")
            kind = jnp.dtype(spec.dtype).name
            prompts = SD3PromptEncoders(str(place), spec.max_sequence_length, kind)
        check_latents((config.in_channels, config.out_channels), coder, place)
        step = coder.downscale * config.patch_size
        own = config.sample_size * coder.downscale
        most = config.pos_embed_max_size * step
        size = picture_size(spec.resolution, own, step, most)
        rows, columns = size.height // step, size.width // step
        others = [picture_size(str(one), own, step, most) for one in spec.sizes]
        # Of the positional table, what the highest and the widest picture need.
        crop = (
            max(one.height for one in (size, *others)) // step,
            max(one.width for one in (size, *others)) // step,
        )
        network = SD3Denoiser(
            dataclasses.replace(config, position_crop=crop)
        ).with_options(
            lora_rank=spec.lora_rank,
            lora_alpha=spec.lora_alpha,
            lora_targets=spec.lora_targets or None,
            dtype=jnp.dtype(spec.dtype),
        )
        return FlowModel(
            name=spec.name,
            denoiser=network,
            autoencoder=vae.VAE(coder),
            latent_shape=latent_shape(size, coder, config.in_channels),
            text_tokens=CLIP_TOKENS + spec.max_sequence_length,
            prompts=prompts,
            shift=Shift() if place is None else scheduler.shift(place, rows * columns),
            transformer_path=spec.transformer_path,
        )

    def table(self, model: FlowModel) -> tensors.Table:
        return transformer_config.table(_config(model))

    def original_names(self, model: FlowModel) -> OriginalNames:
        return original_names.names(_config(model).num_layers)

    def folded(self, variables: Variables, model: FlowModel) -> Variables:
        """All that the transformer's file holds, on the host.

        Here is a crop of the positional table: all of it is in the base model.
        """
        config = _config(model)
        size = config.pos_embed_max_size
        whole = jax.ShapeDtypeStruct((size, size, config.width), np.dtype(np.float32))
        assert isinstance(model.prompts, SD3PromptEncoders)
        buffers = {"pos_embed": {"table": whole}}
        like = {"transformer": variables["transformer"], "buffers": buffers}
        source = self.source(Path(model.prompts.folder), model, like)
        positions = source.read(buffers, alone=False)
        return overlay(super().folded(variables, model), positions)

    def config_json(self, model: FlowModel) -> dict[str, Any]:
        config = _config(model)
        names = transformer_config.file_fields()
        values = {name: getattr(config, name) for name in names}
        values["dual_attention_layers"] = list(config.dual_attention_layers)
        return values | {"caption_projection_dim": config.width}


def _config(model: FlowModel) -> MMDiTConfig:
    assert isinstance(model.denoiser, SD3Denoiser)
    return model.denoiser.config


CODE = SD3Code()
