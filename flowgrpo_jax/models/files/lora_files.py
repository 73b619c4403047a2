"""LoRA adapters to and from the files of diffusers and PEFT.

Both hold `<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] for every
linear layer of the transformer; a fused projection of ours is three of theirs. The
strength, alpha / rank, stands beside the weights: in the header of diffusers' file (a
reader that finds none there takes alpha = rank) and in PEFT's adapter_config.json.
`lora_reading.read` takes these and what other writers make of them.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import safetensors_files, tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
_DIFFUSERS_PREFIX, _PEFT_PREFIX = "transformer.", "base_model.model."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Weights by name (`<module>.lora_A.weight`) and alpha; the rank is in them."""

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
        """The same change with alpha = rank, for readers that know no alpha."""
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
    adapter: Adapter, like: Any, table: tensors.Table, alpha: float
) -> Any:
    """A `lora` tree of the shapes of `like` that makes the same change under `alpha`.

    UserError, naming the module, where the adapter has others than `like`.
    """
    lora = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    if adapter.rank != _rank(like):
        raise UserError(
            f"train.lora_rank: {_rank(like)}: the adapter of train.lora_path has rank "
            f"{adapter.rank}: set it to that"
        )
    left = set(adapter.weights)
    scale = np.float32(adapter.alpha / alpha)
    for module, a, b in _modules(lora, table):
        for part, target, factor in (("A", a, np.float32(1)), ("B", b, scale)):
            name = f"{module}.lora_{part}.weight"
            if name not in left or adapter.weights[name].T.shape != target.shape:
                found = adapter.weights.get(name)
                shape = "missing" if found is None else f"shape {list(found.shape)}"
                raise UserError(
                    f"train.lora_path: {name}: {shape}: the adapter must be of this "
                    f"transformer, with {list(target.T.shape)} here"
                )
            target[...] = adapter.weights[name].T * factor
            left.discard(name)
    if left:
        raise UserError(
            f"train.lora_path: {min(left)}: a module that is not adapted here: let "
            "train.lora_targets name it"
        )
    return lora


def write_diffusers(folder: str | Path, adapter: Adapter) -> Path:
    """`pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights` reads it."""
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
