"""What a transformers folder says of a Mask2Former."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json
from flowgrpo_jax.models.mask2former import swin

SUPPORTED: dict[str, list[Any]] = {
    "model_type": ["mask2former"],
    "pre_norm": [False],
    "activation_function": ["relu"],
    "feature_strides": [[4, 8, 16, 32]],
    "common_stride": [4],
}

# Of training and of its losses.
_HARMLESS = (
    *("backbone_config", "ignore_value", "no_object_weight", "class_weight"),
    *("mask_weight", "dice_weight", "train_num_points", "oversample_ratio"),
    *("importance_sample_ratio", "init_std", "init_xavier_std", "num_hidden_layers"),
    *("use_auxiliary_loss", "output_auxiliary_logits", "backbone_kwargs"),
    *("use_pretrained_backbone", "use_timm_backbone", "hidden_size", "num_labels"),
)
_NO_NAME = ("backbone", None)


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig:
    """Fields of transformers' Mask2Former config.json."""

    backbone: swin.SwinConfig = swin.SwinConfig(depths=(2, 2, 18, 2))
    labels: tuple[str, ...] = ()  # class names, in the order of the logits
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    encoder_feedforward_dim: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 10  # one more than there are: the first predicts from queries
    num_attention_heads: int = 8
    dim_feedforward: int = 2048
    enforce_input_projection: bool = False
    num_queries: int = 100
    dtype: DTypeLike = jnp.float32  # matmuls and residual streams

    @property
    def projects_input(self) -> bool:
        return self.enforce_input_projection or self.feature_size != self.hidden_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Mask2FormerConfig":
        """From the keys of config.json; UserError for what is not implemented."""
        where = "model: Mask2Former's config"
        known = (*_HARMLESS, *config_json.BOOKKEEPING)
        # The networks of a pretrained backbone are told by backbone_config.
        values = {key: values[key] for key in values if (key, values[key]) != _NO_NAME}
        config = config_json.build(cls, values, SUPPORTED, where, known)
        if not isinstance(values.get("backbone_config"), Mapping):
            raise UserError(f"{where}: backbone_config: must be an object")
        names = values.get("id2label")
        if not isinstance(names, Mapping) or {*names} != {*map(str, range(len(names)))}:
            raise UserError(f"{where}: id2label: must name the classes 0, 1, ...")
        return dataclasses.replace(
            config,
            backbone=swin.SwinConfig.from_dict(values["backbone_config"]),
            labels=tuple(names[str(i)] for i in range(len(names))),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Mask2FormerConfig":
        """From the config.json of a transformers folder."""
        return cls.from_dict(config_json.read(folder))

    def with_dtype(self, dtype: DTypeLike) -> "Mask2FormerConfig":
        """The same network computing in `dtype`."""
        backbone = dataclasses.replace(self.backbone, dtype=dtype)
        return dataclasses.replace(self, backbone=backbone, dtype=dtype)
