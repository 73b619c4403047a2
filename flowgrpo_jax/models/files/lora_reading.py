"""LoRA files as they come: diffusers', PEFT's, and what other writers make of these.

Writers put other prefixes before a module's name, the name of the adapter behind
`lora_A`, and alpha in one of three places: an `.alpha` tensor per module, the header of
diffusers' file, PEFT's adapter_config.json. Whatever changes the formula and is not
followed here is refused by its name: a wrong strength would not show.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json, safetensors_files, weight_folders
from flowgrpo_jax.models.files.lora_files import (
    DIFFUSERS_FILE,
    METADATA,
    PEFT_CONFIG,
    PEFT_FILE,
    Adapter,
)
from flowgrpo_jax.runtime import paths

# Before the name of a module: of diffusers' part, of PEFT's and of torch.compile's wrap.
_PREFIXES = ("transformer.", "base_model.model.", "_orig_mod.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_(?P<letter>[AB])|lora[._](?P<word>down|up))"
    r"(\.(?P<adapter>[\w-]+))?\.weight"
)
_LETTERS = {"down": "A", "up": "B"}
_PEFT_DEFAULT = 8  # of r and of lora_alpha
# Keys of a LoraConfig that change what the factors do, with what is implemented.
_SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    # Others change the base model's own weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Of training, or told by the names of the tensors.
_HARMLESS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "task_type", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", "eva_config"),
    *("loftq_config", "runtime_config", "ensure_weight_tying"),
)
# How names of layouts begin that are not read.
_OTHERS = {
    "lora_unet_": "kohya's",
    "lora_transformer_": "kohya's",
    "lora_te": "kohya's",
    "diffusion_model.": "ComfyUI's, or that of the original checkpoint",
    "model.diffusion_model.": "ComfyUI's, or that of the original checkpoint",
    "unet.": "that of a UNet, not of a transformer",
    "lycoris_": "LyCORIS's",
}


class _Found(NamedTuple):
    """What a file holds, by module: the factors, and alpha where a tensor tells it."""

    factors: dict[str, dict[str, np.ndarray]]
    alphas: dict[str, float]


def read(path: str | Path) -> Adapter:
    """The adapter of a LoRA file, of the folder of one, or of a PEFT folder."""
    file, config = _files(paths.local(path))
    where = f"train.lora_path: {file}"
    try:
        tensors, header = safetensors_files.read_header(file)
        safetensors_files.check_sum(file)
    except UserError as error:  # of weights; the user knows the key
        raise UserError(f"train.lora_path: {error}") from error
    found = _sort(tensors, where)
    rank = _check_factors(found.factors, where)
    if config is not None:
        told = config_json.load(config, "train.lora_path")
        alpha = _alpha(told, rank, f"train.lora_path: {config}")
    elif METADATA in header:
        whole = config_json.parse(header[METADATA], f"{where}: {METADATA}")
        begin = "transformer."
        told = {k.removeprefix(begin): whole[k] for k in whole if k.startswith(begin)}
        alpha = _alpha(told, rank, f"{where}: {METADATA}")
    else:
        alpha = None
    return _adapter(found, rank, alpha, where)


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
    for name, stored in tensors.items():
        _check_layout(name, where)
        match = _FACTOR.fullmatch(name)
        values = stored.map().astype(np.float32)
        if match:
            adapters.add(match["adapter"])
            parts = factors.setdefault(_module(match["module"]), {})
            letter = match["letter"] or _LETTERS[match["word"]]
            if letter in parts:
                raise UserError(f"{where}: {name}: stands there under two names")
            parts[letter] = values
        elif name.endswith(".alpha") and values.size == 1:
            alphas[_module(name.removesuffix(".alpha"))] = float(values.reshape(()))
        else:
            raise UserError(
                f"{where}: {name}: is no lora_A, lora_B or alpha: only plain LoRA is "
                "read (no DoRA, LoHa, LoKr, biases or whole layers)"
            )
        if not np.isfinite(values).all():
            raise UserError(f"{where}: {name}: holds values that are not finite")
    if not factors:
        raise UserError(f"{where}: holds no LoRA (lora_A, lora_B)")
    if len(adapters) > 1:
        named = ", ".join(sorted(str(name) for name in adapters))
        raise UserError(f"{where}: holds several adapters ({named}): give one alone")
    return _Found(factors, alphas)


def _module(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _check_layout(name: str, where: str) -> None:
    """UserError for what belongs to another network, or is named as others name it."""
    name = _module(name)
    if name.startswith(("text_encoder", "text_model", "lora_te")):
        raise UserError(
            f"{where}: {name}: the file changes a text encoder too, which is not "
            "supported: give one with the transformer's tensors alone"
        )
    for begin, whose in _OTHERS.items():
        if name.startswith(begin):
            raise UserError(
                f"{where}: {name}: names seem to be in {whose} layout: must be those of "
                "diffusers, as transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
            )


def _check_factors(factors: dict[str, dict[str, np.ndarray]], where: str) -> int:
    """The rank of all; UserError if they do not belong together."""
    ranks = {}
    for module, parts in factors.items():
        if parts.keys() != {"A", "B"}:
            (missing,) = {"A", "B"} - parts.keys()
            raise UserError(f"{where}: {module}.lora_{missing}.weight: missing")
        if any(value.ndim != 2 or 0 in value.shape for value in parts.values()):
            raise UserError(f"{where}: {module}: lora_A and lora_B must be matrices")
        ranks[module] = parts["A"].shape[0]
        if parts["B"].shape[1] != ranks[module]:
            raise UserError(
                f"{where}: {module}: lora_A has rank {ranks[module]}, lora_B "
                f"{parts['B'].shape[1]}"
            )
    one, rank = next(iter(ranks.items()))
    for other in ranks:
        if ranks[other] != rank:
            raise UserError(
                f"{where}: {other}: rank {ranks[other]}: must be {rank}, as of {one}: "
                "adapters of several ranks are not supported"
            )
    return rank


def _alpha(told: Mapping[str, Any], rank: int, where: str) -> float:
    """That of a LoraConfig; UserError for one that is no plain LoRA of this rank."""
    if not told:
        raise UserError(f"{where}: tells nothing of the transformer's LoRA")
    config_json.check_known(told, _SUPPORTED, _HARMLESS, where)
    if (r := told.get("r", _PEFT_DEFAULT)) != rank:
        raise UserError(f"{where}: r: {r}: the weights are of rank {rank}")
    alpha = config_json.number(told, "lora_alpha", float(_PEFT_DEFAULT), where)
    if alpha <= 0:
        raise UserError(f"{where}: lora_alpha: {alpha:g}: must be above 0")
    return alpha


def _adapter(found: _Found, rank: int, alpha: float | None, where: str) -> Adapter:
    """One alpha for all modules; where they have several, B carries the difference."""
    alphas = found.alphas or dict.fromkeys(found.factors, alpha or 0.0)
    if found.alphas:
        for module in sorted(found.factors.keys() ^ alphas.keys()):
            raise UserError(
                f"{where}: {module}: has no alpha, or nothing but one, and others have "
                "both: which strength is meant?"
            )
        for module, value in alphas.items():
            if alpha is not None and value != alpha:
                raise UserError(
                    f"{where}: {module}.alpha: {value:g}: the configuration says "
                    f"{alpha:g}: which is meant?"
                )
    elif alpha is None:
        print(f"{where}: tells no alpha: taken for the rank, {rank}, as diffusers does")
        alphas = dict.fromkeys(found.factors, float(rank))
    for module, value in alphas.items():
        if value <= 0:
            raise UserError(f"{where}: {module}.alpha: {value:g}: must be above 0")
    common = next(iter(alphas.values())) if len(set(alphas.values())) == 1 else rank
    weights = {}
    for module, parts in found.factors.items():
        weights[f"{module}.lora_A.weight"] = parts["A"]
        scale = np.float32(alphas[module] / common)
        weights[f"{module}.lora_B.weight"] = parts["B"] * scale
    return Adapter(weights, float(common))
