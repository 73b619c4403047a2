"""LoRA files as they come: diffusers', PEFT's, kohya's, ComfyUI's and their kin.

Writers put other names before a layer's and other names of the adapter behind `lora_A`
(`lora_names`), and alpha in one of three places: an `.alpha` tensor per layer, the
header of diffusers' file, PEFT's adapter_config.json (`lora_config`). What is neither
factor nor alpha is refused by its name; what belongs to a text encoder is left out, and
that is said.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json, safetensors_files, weight_folders
from flowgrpo_jax.models.files.lora_config import LoraConfig
from flowgrpo_jax.models.files.lora_files import (
    DIFFUSERS_FILE,
    METADATA,
    PEFT_CONFIG,
    PEFT_FILE,
    Factors,
)
from flowgrpo_jax.models.files.lora_names import LayerNames, plain
from flowgrpo_jax.runtime import paths

_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(lora_(?P<letter>[AB])|(lora[._])?(?P<word>down|up))"
    r"(\.(?P<adapter>[\w-]+))?\.weight"
)
_LETTERS = {"down": "A", "up": "B"}
# How a text encoder's tensors begin: diffusers', kohya's, ComfyUI's.
_TEXT_ENCODER = re.compile(
    r"text_encoders\.\w+|text_encoder(_\d)?|lora_te\d?|text_model"
)


class _Found(NamedTuple):
    """What a file holds, by layer: the factors, and alpha where a tensor tells it."""

    factors: dict[str, dict[str, np.ndarray]]
    alphas: dict[str, float]


def read(path: str | Path, names: LayerNames) -> dict[str, Factors]:
    """Layers of diffusers and their factors: of a file, its folder, or a PEFT folder."""
    file, config = _files(paths.local(path))
    where = f"train.lora_path: {file}"
    try:
        tensors, header = safetensors_files.read_header(file)
        safetensors_files.check_sum(file)
    except UserError as error:  # of weights; the user knows the key
        raise UserError(f"train.lora_path: {error}") from error
    found = _sort(tensors, where)
    _check_factors(found.factors, where)
    strengths = _strengths(found, _told(config, header, where), where)
    layers: dict[str, Factors] = {}
    for name, parts in found.factors.items():
        whole = Factors(parts["A"], parts["B"], strengths[name])
        for layer, factors in names.split(name, whole, where):
            if layer in layers:
                raise UserError(f"{where}: {name}: stands there under two names")
            layers[layer] = factors
    return layers


def _told(
    config: Path | None, header: Mapping[str, str], where: str
) -> LoraConfig | None:
    """What PEFT's file says beside the weights, or diffusers' header."""
    if config is not None:
        told = config_json.load(config, "train.lora_path")
        return LoraConfig.parse(told, f"train.lora_path: {config}")
    if METADATA not in header:
        return None
    where = f"{where}: {METADATA}"
    told = config_json.parse(header[METADATA], where)
    if any("." in key for key in told):  # of a pipeline, with a part's name before each
        begin = "transformer."
        told = {k.removeprefix(begin): told[k] for k in told if k.startswith(begin)}
    return LoraConfig.parse(told, where)


def _files(path: Path) -> tuple[Path, Path | None]:
    """The weights and, of a PEFT folder, its configuration."""
    if path.is_file():
        config = path.parent / PEFT_CONFIG
        if path.name == PEFT_FILE and not config.is_file():
            raise UserError(
                f"train.lora_path: {path}: its {PEFT_CONFIG} must lie beside it: the "
                "strength stands there"
            )
        # A file of diffusers may share its folder with PEFT's.
        beside = config.is_file() and path.name != DIFFUSERS_FILE
        return path, config if beside else None
    if (path / PEFT_CONFIG).is_file() or (path / PEFT_FILE).is_file():
        if not (path / PEFT_FILE).is_file():
            raise UserError(
                f"train.lora_path: {path}: holds {PEFT_CONFIG} and no {PEFT_FILE} "
                "(other formats are not read)"
            )
        return _files(path / PEFT_FILE)
    if not path.is_dir() or (path / DIFFUSERS_FILE).is_file():
        found = [path / DIFFUSERS_FILE if path.is_dir() else path]
    else:
        found = sorted(path.glob(f"*{weight_folders.FILE}"))
    if len(found) != 1:
        held = ", ".join(file.name for file in found) or "no .safetensors file"
        raise UserError(
            f"train.lora_path: {path}: holds {held}: give a {DIFFUSERS_FILE}, a folder "
            "with it, or one that PEFT has written"
        )
    return found[0], None


def _sort(tensors: Mapping[str, safetensors_files.Stored], where: str) -> _Found:
    """The tensors by what they are; UserError for one that is neither factor nor alpha.

    Adapters beside one another in a file, told apart by their names, are refused: which
    of them is meant?
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    alphas: dict[str, float] = {}
    adapters = set()
    for name, stored in _of_the_transformer(tensors, where).items():
        match = _FACTOR.fullmatch(name)
        values = stored.map().astype(np.float32)
        if match:
            adapters.add(match["adapter"])
            parts = factors.setdefault(plain(match["layer"]), {})
            letter = match["letter"] or _LETTERS[match["word"]]
            if letter in parts:
                raise UserError(f"{where}: {name}: stands there under two names")
            parts[letter] = values
        elif name.endswith(".alpha") and values.size == 1:
            alphas[plain(name.removesuffix(".alpha"))] = float(values.reshape(()))
        else:
            raise UserError(
                f"{where}: {name}: is no lora_A, lora_B or alpha: only plain LoRA is "
                "read (no DoRA, LoHa, LoKr, biases or whole layers)"
            )
        if not np.isfinite(values).all():
            raise UserError(f"{where}: {name}: holds values that are not finite")
    if not factors:
        raise UserError(f"{where}: holds no LoRA of a transformer (lora_A, lora_B)")
    if len(adapters) > 1:
        named = ", ".join(sorted(str(name) for name in adapters))
        raise UserError(f"{where}: holds several adapters ({named}): give one alone")
    return _Found(factors, alphas)


def _of_the_transformer(
    tensors: Mapping[str, safetensors_files.Stored], where: str
) -> dict[str, safetensors_files.Stored]:
    """What is left without the parts of text encoders, which are named in a line."""
    others = {name: _TEXT_ENCODER.match(plain(name)) for name in tensors}
    if parts := sorted({match[0] for match in others.values() if match}):
        count = sum(match is not None for match in others.values())
        print(
            f"{where}: {', '.join(parts)}: {count} tensors are left out: a text encoder "
            "is not adapted here, and reads prompts as that of the base model"
        )
    return {name: tensors[name] for name in tensors if not others[name]}


def _check_factors(factors: dict[str, dict[str, np.ndarray]], where: str) -> None:
    """UserError if they do not belong together."""
    for layer, parts in factors.items():
        if parts.keys() != {"A", "B"}:
            (missing,) = {"A", "B"} - parts.keys()
            raise UserError(f"{where}: {layer}.lora_{missing}.weight: missing")
        if any(value.ndim != 2 or 0 in value.shape for value in parts.values()):
            raise UserError(f"{where}: {layer}: lora_A and lora_B must be matrices")
        if parts["B"].shape[1] != parts["A"].shape[0]:
            raise UserError(
                f"{where}: {layer}: lora_A has rank {parts['A'].shape[0]}, lora_B "
                f"{parts['B'].shape[1]}"
            )


def _strengths(found: _Found, told: LoraConfig | None, where: str) -> dict[str, float]:
    """Of every layer; UserError where two places tell of alpha, and not the same."""
    ranks = {layer: parts["A"].shape[0] for layer, parts in found.factors.items()}
    if not found.alphas:
        if told is not None:
            return {layer: told.strength(layer, rank) for layer, rank in ranks.items()}
        print(
            f"{where}: tells no alpha: taken for the rank of each layer, as diffusers "
            "does: strength 1"
        )
        return dict.fromkeys(ranks, 1.0)
    for layer in sorted(ranks.keys() ^ found.alphas.keys()):
        raise UserError(
            f"{where}: {layer}: has no alpha, or nothing but one, and others have "
            "both: which strength is meant?"
        )
    for layer, value in found.alphas.items():
        if value <= 0:
            raise UserError(f"{where}: {layer}.alpha: {value:g}: must be above 0")
        if told is None:
            continue
        if told.rank_stabilized:
            raise UserError(
                f"{where}: {layer}.alpha: {value:g}: the configuration says use_rslora "
                "as well: which strength is meant?"
            )
        if value != (other := told.alpha_of(layer, ranks[layer])):
            raise UserError(
                f"{where}: {layer}.alpha: {value:g}: the configuration says "
                f"{other:g}: which is meant?"
            )
    return {layer: found.alphas[layer] / rank for layer, rank in ranks.items()}
