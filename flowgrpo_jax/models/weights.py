"""Variables to and from one safetensors file, with JSON metadata in its header."""

import json
import os
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from flowgrpo_jax.errors import UserError


def save(path: str | Path, variables: dict, metadata: dict, dtype=np.float16) -> None:
    """Write a tree of arrays; names are the tree's keys joined by '/'.

    Half precision halves the file and costs nothing that a sampled picture shows.
    The file appears whole or not at all; UserError if the disk refuses it.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    # safetensors writes memory as it lies: a transposed view would come back scrambled.
    arrays = {name: np.asarray(value, dtype, order="C") for name, value in flat.items()}
    partial = Path(path).with_suffix(".partial")
    try:
        header = {"json": json.dumps(metadata)}
        # Not `save_file`: only its owner may read what that leaves.
        partial.write_bytes(safetensors.numpy.save(arrays, header))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"weights: {path}: cannot be written ({error}): free some space or make "
            "its folder writable; what was there is intact"
        ) from error
    os.replace(partial, path)


def load(path: str | Path) -> tuple[dict, dict]:
    """Read (variables in fp32, metadata); UserError if missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"weights: {path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            flat = {
                name: file.get_tensor(name).astype(np.float32) for name in file.keys()
            }
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
    except SafetensorError as error:
        raise UserError(
            f"weights: {path}: not a readable safetensors file ({error})"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"weights: {path}: the metadata in its header is not JSON ({error})"
        ) from error
    return traverse_util.unflatten_dict(flat, sep="/"), metadata
