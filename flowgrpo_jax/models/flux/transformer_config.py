"""What a FLUX.1 transformer is made of, and its names in the files of diffusers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import layer_names
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.tensors import Rule
from flowgrpo_jax.models.layer_names import layer_rules, norm_rules

CLASS = "FluxTransformer2DModel"
PATCH = 2  # latent pixels along a side of a token; the pipeline packs them
_FIXED = {"patch_size": (1,)}  # of packed tokens


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Fields and defaults of diffusers' transformer/config.json, then our own."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19  # double blocks: image and text have weights of their own
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    mlp_ratio: int = 4
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()  # as `adapted_layers` gives them
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream
    attention: str = "xla"  # see attention.choose
    remat: str = "none"  # one of remat.POLICIES

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def latent_channels(self) -> int:
        """Channels of a latent before PATCH x PATCH of its pixels are one token."""
        return self.in_channels // PATCH**2

    @classmethod
    def from_folder(cls, folder: str | Path) -> "FluxConfig":
        """The config.json of a diffusers transformer folder."""
        values = config_json.read(folder)
        return cls.from_dict(values, f"model: {Path(folder) / 'config.json'}")

    @classmethod
    def from_dict(
        cls, given: Mapping[str, Any], where: str = "transformer"
    ) -> "FluxConfig":
        """The same from its contents; UserError for what this network does not do."""
        kind = given.get("_class_name", CLASS)
        if kind != CLASS:
            raise UserError(f"{where}: {kind}: must be a {CLASS}")
        values = config_json.of_network(given)
        for key in sorted(values.keys() - set(file_fields())):
            raise UserError(f"{where}: {key}: {values[key]}: not supported")
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels", 64)
        config = config_json.build(cls, values, _FIXED, where, ())
        config = dataclasses.replace(
            config, axes_dims_rope=tuple(config.axes_dims_rope)
        )
        _check(config, where)
        return config


def file_fields() -> list[str]:
    """What FluxConfig takes from config.json."""
    names = [field.name for field in dataclasses.fields(FluxConfig)]
    return names[: names.index("mlp_ratio")]


def _check(config: FluxConfig, where: str) -> None:
    """UserError for values that no network of this family has."""
    axes = config.axes_dims_rope
    if sum(axes) != config.attention_head_dim or any(size % 2 for size in axes):
        raise UserError(
            f"{where}: axes_dims_rope: {axes}: must be even numbers that add up to "
            f"attention_head_dim, {config.attention_head_dim}"
        )
    if len(axes) != 3:
        raise UserError(f"{where}: axes_dims_rope: {axes}: must be three numbers")
    if config.in_channels != config.out_channels or config.in_channels % PATCH**2:
        raise UserError(
            f"{where}: in_channels and out_channels: {config.in_channels} and "
            f"{config.out_channels}: must be equal multiples of {PATCH**2}"
        )
    for key in ("num_layers", "num_single_layers"):
        if getattr(config, key) < 1:
            raise UserError(f"{where}: {key}: {getattr(config, key)}: must be above 0")


# Our layer to diffusers'; of a block of each kind, and around the blocks.
DOUBLE_LAYERS: dict[str, str | tuple[str, ...]] = {
    "norm1": "norm1.linear",
    "norm1_context": "norm1_context.linear",
    "attn/qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn/add_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn/to_out": "attn.to_out.0",
    "attn/to_add_out": "attn.to_add_out",
    "ff/proj": "ff.net.0.proj",
    "ff/out": "ff.net.2",
    "ff_context/proj": "ff_context.net.0.proj",
    "ff_context/out": "ff_context.net.2",
}
DOUBLE_NORMS = {
    "attn/norm_q": "attn.norm_q",
    "attn/norm_k": "attn.norm_k",
    "attn/add_norm_q": "attn.norm_added_q",
    "attn/add_norm_k": "attn.norm_added_k",
}
SINGLE_LAYERS: dict[str, str | tuple[str, ...]] = {
    "norm": "norm.linear",
    "attn/qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj_mlp": "proj_mlp",
    "proj_out": "proj_out",
}
SINGLE_NORMS = {"attn/norm_q": "attn.norm_q", "attn/norm_k": "attn.norm_k"}
OUTER_LAYERS: dict[str, str | tuple[str, ...]] = {
    "x_embedder": "x_embedder",
    "context_embedder": "context_embedder",
    "time_text_embed/timestep_1": "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed/timestep_2": "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed/guidance_1": "time_text_embed.guidance_embedder.linear_1",
    "time_text_embed/guidance_2": "time_text_embed.guidance_embedder.linear_2",
    "time_text_embed/text_1": "time_text_embed.text_embedder.linear_1",
    "time_text_embed/text_2": "time_text_embed.text_embedder.linear_2",
    "norm_out": "norm_out.linear",
    "proj_out": "proj_out",
}
# Before our names in `lora_targets` -> (before diffusers', layers).
_GROUPS = {
    "double/": ("transformer_blocks.", DOUBLE_LAYERS),
    "single/": ("single_transformer_blocks.", SINGLE_LAYERS),
    "": ("", OUTER_LAYERS),
}


def adapted_layers(patterns: Sequence[str]) -> tuple[str, ...]:
    """Our layers that LoRA patterns name; see `layer_names.adapted`."""
    like = "attn.to_q, attn.to_out.0, ff.net.2, proj_mlp, norm1.linear"
    return layer_names.adapted(patterns, _GROUPS, like)


def table(config: FluxConfig) -> list[Rule]:
    """Rename table to the files of diffusers' `FluxTransformer2DModel`."""
    del config  # the same names whatever the sizes
    rules = layer_rules(OUTER_LAYERS, "", "")
    for layers, norms, ours, theirs in (
        (DOUBLE_LAYERS, DOUBLE_NORMS, "double_blocks", "transformer_blocks"),
        (SINGLE_LAYERS, SINGLE_NORMS, "single_blocks", "single_transformer_blocks"),
    ):
        inside, there = f"{ours}/block/", f"{theirs}.{{layer}}."
        rules += layer_rules(layers, inside, there)
        rules += norm_rules(norms, inside, there)
    return rules
