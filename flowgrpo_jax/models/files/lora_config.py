"""What a LoraConfig says of strengths: PEFT's file, or diffusers' header.

Whatever changes the formula and is not followed here is refused by its name: a wrong
strength would not show.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json

_DEFAULT = 8.0  # PEFT's, of r and of lora_alpha
# Keys that change what the factors do, with what is implemented.
_SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, True, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    # Others change the base model's own weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Read below, of training, or told by the names of the tensors.
_HARMLESS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "task_type", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", "eva_config"),
    *("loftq_config", "runtime_config", "ensure_weight_tying"),
)

_Patterns = tuple[tuple[re.Pattern, float], ...]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank and alpha of all layers, and of those whose names patterns match."""

    rank: float
    alpha: float
    ranks: _Patterns
    alphas: _Patterns
    rank_stabilized: bool  # rsLoRA: alpha / sqrt(rank)
    where: str

    @classmethod
    def parse(cls, told: Mapping[str, Any], where: str) -> "LoraConfig":
        """Of the keys of a file; UserError for what is no plain LoRA."""
        if not told:
            raise UserError(f"{where}: tells nothing of the transformer's LoRA")
        config_json.check_known(told, _SUPPORTED, _HARMLESS, where)
        alpha = config_json.number(told, "lora_alpha", _DEFAULT, where)
        if alpha <= 0:
            raise UserError(f"{where}: lora_alpha: {alpha:g}: must be above 0")
        return cls(
            config_json.number(told, "r", _DEFAULT, where),
            alpha,
            _patterns(told, "rank_pattern", where),
            _patterns(told, "alpha_pattern", where),
            bool(told.get("use_rslora")),
            where,
        )

    def alpha_of(self, layer: str, rank: int) -> float:
        """Of a layer whose factors have that rank; UserError if it should be another."""
        if (wanted := _first(self.ranks, layer, self.rank)) != rank:
            raise UserError(
                f"{self.where}: r: {wanted:g}: the weights are of rank {rank} ({layer}; "
                "rank_pattern included)"
            )
        return _first(self.alphas, layer, self.alpha)

    def strength(self, layer: str, rank: int) -> float:
        """What the product of a layer's factors is multiplied with."""
        below = math.sqrt(rank) if self.rank_stabilized else rank
        return self.alpha_of(layer, rank) / below


def _first(patterns: _Patterns, layer: str, otherwise: float) -> float:
    """The value of the first pattern that matches, as PEFT has it."""
    found = (value for pattern, value in patterns if pattern.match(layer))
    return next(found, otherwise)


def _patterns(told: Mapping[str, Any], key: str, where: str) -> _Patterns:
    """Regular expressions of the ends of names, from a dot on, with their numbers."""
    given = told.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {key}: must be an object of names and numbers")
    return tuple(
        (_pattern(name, f"{where}: {key}"), _above_0(given, name, f"{where}: {key}"))
        for name in given
    )


def _above_0(given: Mapping[str, Any], name: str, where: str) -> float:
    value = config_json.number(given, name, 0.0, where)
    if value <= 0:
        raise UserError(f"{where}: {name}: {value:g}: must be above 0")
    return value


def _pattern(name: str, where: str) -> re.Pattern:
    try:
        if not _takes_long(name):
            return re.compile(rf"(.*\.)?({name})$")
        problem = "has more than two repetitions, or eight choices, to be followed"
    except (re.error, OverflowError, RecursionError) as error:
        problem = f"is no regular expression ({error})"
    raise UserError(f"{where}: {name[:100]}: {problem}")


def _takes_long(pattern: str) -> bool:
    """Whether a match could take for ever: a file may come from anywhere."""
    repeats = sum(pattern.count(mark) for mark in "*+?{")
    nested = re.search(r"\)[*+?{]", pattern)
    return bool(nested) or repeats > 2 or pattern.count("|") > 8 or len(pattern) > 200
