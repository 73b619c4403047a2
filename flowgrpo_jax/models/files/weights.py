"""Variables to and from one safetensors file, with JSON metadata in its header."""

import json
from pathlib import Path

import numpy as np
from flax import traverse_util

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json, safetensors_files


def save(path: str | Path, variables: dict, metadata: dict, dtype=np.float16) -> None:
    """Write a tree of arrays; names are the tree's keys joined by '/'.

    Half precision halves the file and costs nothing that a sampled picture shows.
    The file appears whole or not at all; UserError if the disk refuses it.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    arrays = {name: np.asarray(flat[name], dtype) for name in sorted(flat)}
    header = {"json": json.dumps(metadata)}
    safetensors_files.write_arrays(Path(path), arrays, header)


def load(path: str | Path) -> tuple[dict, dict]:
    """Read (variables in fp32, metadata); UserError if missing or damaged."""
    path, metadata = Path(path), read_metadata(path)
    found = safetensors_files.read_header(path)
    safetensors_files.check_sum(path)
    flat = {name: stored.map().astype(np.float32) for name, stored in found[0].items()}
    try:
        return traverse_util.unflatten_dict(flat, sep="/"), metadata
    except (IndexError, TypeError, ValueError) as error:  # an array named as a group is
        raise UserError(
            f"weights: {path}: holds a tensor in the place of a group of tensors: give "
            "a file that this package has written"
        ) from error


def read_metadata(path: str | Path) -> dict:
    """What stands in the header beside the arrays; UserError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file")
    held = safetensors_files.read_header(path).metadata.get("json", "{}")
    return config_json.parse(held, f"weights: {path}: the metadata in its header")
