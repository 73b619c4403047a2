"""LoRA adapters to and from the files of diffusers and PEFT.

Both hold `<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] for every
linear layer of the transformer; a fused projection of ours is three of theirs. The
strength, alpha / rank, stands beside the weights: in PEFT's adapter_config.json, and in
the header of diffusers' file, where many readers do not look. These take alpha for the
rank, so in that file it is the rank. `lora_reading.read` takes both, and what other
writers make of them.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import safetensors_files, tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
_DIFFUSERS_PREFIX, _PEFT_PREFIX = "transformer.", "base_model.model."


class Factors(NamedTuple):
    """What LoRA adds to the matrix of one linear layer: strength * B @ A."""

    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    strength: float  # alpha / rank, or what a configuration says in its place

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is written: weights by name (`<module>.lora_A.weight`), and alpha.

    The rank is in the weights.
    """

    weights: dict[str, np.ndarray]
    alpha: float

    @property
    def rank(self) -> int:
        name = next(name for name in self.weights if name.endswith("lora_A.weight"))
        return self.weights[name].shape[0]

    @property
    def modules(self) -> list[str]:
        end = ".lora_A.weight"
        return sorted(
            name.removesuffix(end) for name in self.weights if name.endswith(end)
        )

    def folded(self) -> "Adapter":
        """The same change with alpha = rank: what is left of the strength is in B."""
        scale = np.float32(self.alpha / self.rank)
        weights = {
            name: value * scale if name.endswith("lora_B.weight") else value
            for name, value in self.weights.items()
        }
        return Adapter(weights, float(self.rank))


def from_variables(lora: Any, table: tensors.Table, alpha: float) -> Adapter:
    """The adapter of a `lora` tree, in fp32, under the names of the rename table."""
    weights = {}
    for module, a, b in _modules(lora, table):
        weights[f"{module}.lora_A.weight"] = np.asarray(a.T, np.float32, order="C")
        weights[f"{module}.lora_B.weight"] = np.asarray(b.T, np.float32, order="C")
    return Adapter(weights, alpha)


def to_variables(
    layers: Mapping[str, Factors], fresh: Any, table: tensors.Table, alpha: float
) -> Any:
    """A `lora` tree that changes the network as `layers`, by name, do under `alpha`.

    `fresh` is the tree of a run that begins with nothing. Its A stay where `layers`
    have less rank or nothing at all: B is zero there, so that nothing changes, and what
    is zero in both factors would never learn. UserError, naming the key, where `layers`
    have more than `fresh` has room for.
    """
    lora = jax.tree.map(lambda leaf: np.array(leaf, np.float32, order="C"), fresh)
    rank, left = _rank(lora), dict(layers)
    if (most := max(layer.rank for layer in layers.values())) > rank:
        raise UserError(
            f"train.lora_rank: {rank}: the adapter of train.lora_path has rank {most}: "
            "set it to that, or above"
        )
    names = []
    for module, a, b in _modules(lora, table):
        names.append(module)
        b[...] = 0
        if layer := left.pop(module, None):
            a[:, : layer.rank] = layer.a.T
            b[: layer.rank] = layer.b.T * np.float32(layer.strength * rank / alpha)
    if left:
        ends = sorted({re.sub(r"^\w+\.\d+\.", "", name) for name in left})
        raise UserError(
            f"train.lora_path: {min(left)}: a module that is not adapted here: let "
            f"train.lora_targets name {', '.join(ends)} too"
        )
    if count := len(names) - len(layers):
        print(
            f"train.lora_path: {count} of the {len(names)} layers that "
            "train.lora_targets names are not in it: they begin as in the base model"
        )
    return lora


def write_diffusers(folder: str | Path, adapter: Adapter) -> Path:
    """`pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights` reads it.

    Other readers too: alpha is the rank, in the header and for those who look for none.
    """
    adapter = adapter.folded()
    metadata = {
        f"{_DIFFUSERS_PREFIX}{key}": value
        for key, value in (
            ("r", adapter.rank),
            ("lora_alpha", adapter.alpha),
            ("target_modules", adapter.modules),
        )
    }
    header = {"format": "pt", METADATA: json.dumps(metadata, sort_keys=True)}
    path = Path(folder) / DIFFUSERS_FILE
    weights = _prefixed(adapter.weights, _DIFFUSERS_PREFIX)
    safetensors_files.write_arrays(path, weights, header)
    return path


def write_peft(folder: str | Path, adapter: Adapter, base: str) -> Path:
    """A PEFT folder, as `PeftModel.from_pretrained(transformer, folder)` reads it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _prefixed(adapter.weights, _PEFT_PREFIX)
    safetensors_files.write_arrays(folder / PEFT_FILE, weights, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapter.modules,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _prefixed(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def _rank(lora: Any) -> int:
    """Of a `lora` tree: the last axis of every `a`."""
    flat = traverse_util.flatten_dict(lora)
    return next(leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a")


def _modules(
    lora: Any, table: tensors.Table
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name in the files, A [in, rank], B [rank, out]) of every adapted layer: views."""
    flat = traverse_util.flatten_dict(lora)
    for path in sorted({path[:-1] for path in flat}):
        a, b = (np.asarray(flat[(*path, name)]) for name in ("a", "b"))
        *lead, parts, inputs, rank = a.shape
        kernel = jax.ShapeDtypeStruct(
            (*lead, inputs, parts * b.shape[-1]), np.dtype(np.float32)
        )
        tree = traverse_util.unflatten_dict({(*path, "kernel"): kernel})
        names = tensors.names(table, tree)
        pairs = zip(
            names,
            a.reshape(-1, inputs, rank),
            b.reshape(-1, rank, b.shape[-1]),
            strict=True,
        )
        for name, down, up in pairs:
            yield name.removesuffix(".weight"), down, up
