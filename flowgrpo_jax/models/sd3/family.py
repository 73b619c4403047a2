"""Stable Diffusion 3 as a FlowModel: from a diffusers folder, and back to one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import lora as loras
from flowgrpo_jax.models import vae
from flowgrpo_jax.models.files import hub, lora_files, lora_reading, tensors
from flowgrpo_jax.models.flow_model import FlowModel, Shift, Variables, overlay
from flowgrpo_jax.models.sd3 import folder as sd3_folder
from flowgrpo_jax.models.sd3 import presets, transformer_config
from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.sd3.denoiser import SD3Denoiser
from flowgrpo_jax.models.sd3.prompts import SD3PromptEncoders
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig
from flowgrpo_jax.models.spec import ModelSpec

# Read by itself: the transformer does not learn it.
_POSITIONS = (r"pos_embed\.pos_embed",)


def find(spec: ModelSpec) -> Path:
    """The diffusers folder of a model; what is not on this machine is downloaded."""
    return hub.folder(spec.place, presets.HUB_IDS)


def plan(spec: ModelSpec, place: Path | None) -> FlowModel:
    """The networks that a folder describes, without weights.

    Without a folder `name` is one of `presets.TRANSFORMERS`, as it was released.
    """
    if place is None:
        config = MMDiTConfig.from_dict(presets.TRANSFORMERS[spec.name])
        coder, prompts = vae.SD3, None
    else:
        sd3_folder.check_index(place)
        config = MMDiTConfig.from_folder(place / "transformer")
        coder = vae.VAEConfig.from_folder(place / "vae")
        kind = jnp.dtype(spec.dtype).name
        prompts = SD3PromptEncoders(str(place), spec.max_sequence_length, kind)
    _check_latents(config, coder, place)
    side = _latent_side(config, coder, spec.resolution)
    patches = side // config.patch_size
    network = SD3Denoiser(
        dataclasses.replace(config, position_crop=(patches, patches))
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
        latent_shape=(side, side, config.in_channels),
        text_tokens=sd3_text.CLIP_TOKENS + spec.max_sequence_length,
        prompts=prompts,
        shift=Shift() if place is None else sd3_folder.shift(place, patches**2),
    )


def _check_latents(
    config: MMDiTConfig, coder: vae.VAEConfig, folder: Path | None
) -> None:
    """UserError for a transformer and an autoencoder that do not fit together."""
    sides = config.in_channels, config.out_channels
    if sides != (coder.latent_channels,) * 2:
        raise UserError(
            f"model: {folder}: transformer/config.json: in_channels and out_channels: "
            f"{sides[0]} and {sides[1]}: latents of the vae have {coder.latent_channels}"
        )
    if (coder.in_channels, coder.out_channels) != (3, 3):
        raise UserError(
            f"model: {folder}: vae/config.json: in_channels and out_channels: must be 3"
        )


def _latent_side(config: MMDiTConfig, coder: vae.VAEConfig, resolution: int) -> int:
    step = coder.downscale * config.patch_size
    most = config.pos_embed_max_size * step
    own = config.sample_size * coder.downscale
    if resolution % step or resolution > most:
        raise UserError(
            f"resolution: {resolution}: must be 0 (the model's own, {own}) or a "
            f"multiple of {step}, at most {most}"
        )
    return (resolution or own) // coder.downscale


def shapes(model: FlowModel, weights: DTypeLike) -> Variables:
    """Shapes of all variables; `weights` is the type of the transformer's."""
    network, coder = model.denoiser.with_options(lora_rank=0), model.autoencoder
    assert isinstance(coder, vae.VAE)
    found = jax.eval_shape(
        lambda key: network.init(key, model.latent_shape), jax.random.key(0)
    )
    return {
        "transformer": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(weights)),
            found["params"],
        ),
        "buffers": found["buffers"],
        "vae": coder.shapes(),
    }


def read(place: Path, model: FlowModel, like: Variables) -> Variables:
    """The variables of a folder, in the types and at the places of `like`."""
    table, network = transformer_config.table(_config(model)), place / "transformer"
    return {
        "transformer": tensors.read(network, table, like["transformer"], _POSITIONS),
        "buffers": tensors.read(network, table, like["buffers"], (".*",)),
        "vae": tensors.read(place / "vae", vae.TABLE, like["vae"]),
    }


def save_result(path: Path, variables: Variables, model: FlowModel) -> None:
    """The LoRA of a run as pytorch_lora_weights.safetensors, or its transformer."""
    if "lora" in variables:
        lora_files.write_diffusers(path, adapter(variables, model))
    else:
        write_transformer(path / "transformer", variables, model)


def adapter(variables: Variables, model: FlowModel) -> lora_files.Adapter:
    """The LoRA of a policy, under the names of diffusers."""
    table, alpha = transformer_config.table(_config(model)), model.denoiser.lora_alpha
    return lora_files.from_variables(jax.device_get(variables["lora"]), table, alpha)


def with_adapter(path: str, lora: Variables, model: FlowModel) -> Variables:
    """A `lora` tree like this one, with the weights of a LoRA file or PEFT folder."""
    table, alpha = transformer_config.table(_config(model)), model.denoiser.lora_alpha
    return lora_files.to_variables(lora_reading.read(path), lora, table, alpha)


def write_transformer(folder: Path, variables: Variables, model: FlowModel) -> None:
    """The transformer as a diffusers folder, any LoRA folded in."""
    config = _config(model)
    host = loras.fold(jax.device_get(variables), config.lora_alpha)["transformer"]
    table, size = transformer_config.table(config), config.pos_embed_max_size
    whole = jax.ShapeDtypeStruct((size, size, config.width), np.dtype(np.float32))
    # Here is a crop of the positional table: all of it is in the base model.
    assert isinstance(model.prompts, SD3PromptEncoders)
    base = Path(model.prompts.folder) / "transformer"
    positions = tensors.read(base, table, {"pos_embed": {"table": whole}}, (".*",))
    tensors.write(folder, overlay(host, positions), table, _config_json(config))


def _config_json(config: MMDiTConfig) -> dict[str, Any]:
    """config.json of diffusers' SD3Transformer2DModel."""
    names = transformer_config.file_fields()
    values = {name: getattr(config, name) for name in names}
    values["dual_attention_layers"] = list(config.dual_attention_layers)
    return {"_class_name": "SD3Transformer2DModel", **values} | {
        "caption_projection_dim": config.width
    }


def _config(model: FlowModel) -> MMDiTConfig:
    assert isinstance(model.denoiser, SD3Denoiser)
    return model.denoiser.config


def usage(base: str | None, transformer: bool) -> str:
    """Code for diffusers that loads a result, in the folder of the model card."""
    place = f'base = "{base}"' if base else "base = ...  # the folder of the base model"
    if transformer:
        return f"""from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

{place}
transformer = SD3Transformer2DModel.from_pretrained("transformer")
pipeline = StableDiffusion3Pipeline.from_pretrained(base, transformer=transformer)"""
    return f"""from diffusers import StableDiffusion3Pipeline

{place}
pipeline = StableDiffusion3Pipeline.from_pretrained(base)
pipeline.load_lora_weights(".")"""
