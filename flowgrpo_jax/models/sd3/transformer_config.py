"""What an SD3 transformer is made of, and its names in the files of diffusers."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import layer_names
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.files.tensors import Rule
from flowgrpo_jax.models.layer_names import layer_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Fields and defaults of diffusers' transformer/config.json, then our own."""

    sample_size: int = 128  # latent pixels at the training resolution
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96  # patches along one side of the positional table
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None  # None or "rms_norm"
    mlp_ratio: int = 4
    # Rows and columns of the crop of the positional table that the weights bring along
    # (collection "buffers"); None computes it.
    position_crop: tuple[int, int] | None = None
    lora_rank: int = 0
    lora_alpha: float = 0.0
    # Layers, as `adapted_layers` gives them; these are Flow-GRPO's.
    lora_targets: tuple[str, ...] = (
        *("attn/qkv", "attn/add_qkv"),
        *("attn/to_out", "attn/to_add_out"),
    )
    dtype: DTypeLike = jnp.float32  # matmuls and residual stream
    attention: str = "xla"  # see attention.choose
    remat: str = "none"  # one of remat.POLICIES

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @classmethod
    def from_folder(cls, folder: str | Path) -> "MMDiTConfig":
        """The config.json of a diffusers transformer folder."""
        values = config_json.read(folder)
        return cls.from_dict(values, f"model: {Path(folder) / 'config.json'}")

    @classmethod
    def from_dict(
        cls, given: Mapping[str, Any], where: str = "transformer"
    ) -> "MMDiTConfig":
        """The same from its contents; UserError for what this network does not do."""
        kind = given.get("_class_name", "SD3Transformer2DModel")
        if kind != "SD3Transformer2DModel":
            raise UserError(f"{where}: {kind}: must be an SD3Transformer2DModel")
        values = config_json.of_network(given)
        caption_width = values.pop("caption_projection_dim", 1152)
        for key in sorted(values.keys() - set(file_fields())):
            raise UserError(f"{where}: {key}: {values[key]}: not supported")
        if values.get("out_channels", 16) is None:
            values["out_channels"] = values.get("in_channels", 16)
        supported = {"qk_norm": (None, "rms_norm")}
        config = config_json.build(cls, values, supported, where, ())
        config = dataclasses.replace(
            config, dual_attention_layers=tuple(sorted(config.dual_attention_layers))
        )
        _check(config, caption_width, where)
        return config


def file_fields() -> list[str]:
    """What MMDiTConfig takes from config.json."""
    names = [field.name for field in dataclasses.fields(MMDiTConfig)]
    return names[: names.index("mlp_ratio")]


def _check(config: MMDiTConfig, caption_width: Any, where: str) -> None:
    """UserError for values that no network of this family has."""
    if caption_width != config.width:
        raise UserError(
            f"{where}: caption_projection_dim: {caption_width}: must be "
            f"num_attention_heads * attention_head_dim = {config.width}"
        )
    if config.width % 4:
        raise UserError(
            f"{where}: attention_head_dim: {config.attention_head_dim}: times "
            "num_attention_heads it must be a multiple of 4, for the positional table"
        )
    if config.sample_size < config.patch_size:
        raise UserError(
            f"{where}: sample_size: {config.sample_size}: must be at least patch_size, "
            f"{config.patch_size}"
        )
    if not set(config.dual_attention_layers) <= set(range(config.num_layers)):
        raise UserError(
            f"{where}: dual_attention_layers: {config.dual_attention_layers}: must "
            f"be numbers of the {config.num_layers} layers"
        )


class Group(NamedTuple):
    """Blocks of one kind in a row: one scanned layer."""

    name: str
    first: int
    depth: int
    dual: bool


def groups(config: MMDiTConfig) -> list[Group]:
    """All blocks but the last, which is a kind of its own.

    SD3.5-medium has `dual_blocks` (13) and `blocks` (10); where kinds alternate, later
    groups carry the number of their first block.
    """
    found: list[Group] = []
    layers = range(config.num_layers - 1)
    for dual, run in itertools.groupby(
        layers, lambda layer: layer in config.dual_attention_layers
    ):
        numbers = list(run)
        name = "dual_blocks" if dual else "blocks"
        if any(group.dual == dual for group in found):
            name = f"{name}_{numbers[0]}"
        found.append(Group(name, numbers[0], len(numbers), dual))
    return found


# Our layer to diffusers'; of a block, and around the blocks.
BLOCK_LAYERS: dict[str, str | tuple[str, ...]] = {
    "norm1": "norm1.linear",
    "norm1_context": "norm1_context.linear",
    "attn/qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn/add_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn/to_out": "attn.to_out.0",
    "attn/to_add_out": "attn.to_add_out",
    "attn2/qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2/to_out": "attn2.to_out.0",
    "ff/proj": "ff.net.0.proj",
    "ff/out": "ff.net.2",
    "ff_context/proj": "ff_context.net.0.proj",
    "ff_context/out": "ff_context.net.2",
}
BLOCK_NORMS = {
    "attn/norm_q": "attn.norm_q",
    "attn/norm_k": "attn.norm_k",
    "attn/add_norm_q": "attn.norm_added_q",
    "attn/add_norm_k": "attn.norm_added_k",
    "attn2/norm_q": "attn2.norm_q",
    "attn2/norm_k": "attn2.norm_k",
}
OUTER_LAYERS: dict[str, str | tuple[str, ...]] = {
    "time_text_embed/timestep_1": "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed/timestep_2": "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed/text_1": "time_text_embed.text_embedder.linear_1",
    "time_text_embed/text_2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "norm_out": "norm_out.linear",
    "proj_out": "proj_out",
}


def adapted_layers(patterns: Sequence[str]) -> tuple[str, ...]:
    """Our layers that LoRA patterns name; see `layer_names.adapted`.

    In the order of BLOCK_LAYERS, then of OUTER_LAYERS.
    """
    groups = {"": ("transformer_blocks.", BLOCK_LAYERS), "/": ("", OUTER_LAYERS)}
    like = "attn.to_q, attn2.to_out.0, ff.net.2, norm1.linear, proj_out"
    found = layer_names.adapted(patterns, groups, like)
    return tuple(name.removeprefix("/") for name in found)


def table(config: MMDiTConfig) -> list[Rule]:
    """Rename table to the files of diffusers' `SD3Transformer2DModel`.

    The positional table ("buffers") is cropped on the way in; to be written it must be
    whole, of `pos_embed_max_size` rows and columns.
    """
    rules = [
        Rule(
            "pos_embed/proj/kernel",
            "pos_embed.proj.weight",
            "patch",
            patch=config.patch_size,
        ),
        Rule("pos_embed/proj/bias", "pos_embed.proj.bias"),
        Rule(
            "pos_embed/table",
            "pos_embed.pos_embed",
            "grid",
            grid=config.pos_embed_max_size,
        ),
    ]
    rules += layer_rules(OUTER_LAYERS, "", "")
    stacks = [
        (f"{group.name}/block/", "transformer_blocks.{layer}.", group.first)
        for group in groups(config)
    ]
    last = f"transformer_blocks.{config.num_layers - 1}."
    for ours, theirs, first in (*stacks, ("last_block/", last, 0)):
        rules += layer_rules(BLOCK_LAYERS, ours, theirs, first)
        rules += norm_rules(BLOCK_NORMS, ours, theirs, first)
    return rules
