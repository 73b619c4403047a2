"""Safetensors files as they lie on disk: where a tensor is, and writing one by one.

The library's numpy side knows no bfloat16 slices and writes all tensors of a file from
memory at once. The format is a length, a JSON header and raw bytes, so that reading is
a memory map of one tensor and writing needs no more memory than one tensor.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What diffusers, transformers and PEFT call the weights of a folder, in the order in
# which they are looked for; a variant (".fp16") is taken only where it is alone.
STEMS = ("diffusion_pytorch_model", "model", "adapter_model")
INDEX = ".safetensors.index.json"
TILE = 256, 512  # rows and columns of a turned matrix that are copied at once


class Stored(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The tensor, read from disk where it is touched and when it is touched."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,))
        return mapped.reshape(self.shape)


def contents(path: str | Path) -> dict[str, Stored]:
    """All tensors of a .safetensors file, or of a folder with one or with an index."""
    path = Path(path)
    if path.is_file():
        return _header(path)
    if not path.is_dir():
        raise UserError(f"weights: {path}: no such file or folder")
    main = _main_file(path)
    if not main.name.endswith(INDEX):
        return _header(main)
    try:
        places: dict[str, str] = json.loads(main.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"weights: {main}: not an index of shards ({error})") from error
    shards = {}
    for shard in sorted(set(places.values())):
        if not (path / shard).is_file():
            raise UserError(
                f"weights: {path / shard}: the index names this shard; "
                "it is missing: download the folder again"
            )
        shards[shard] = _header(path / shard)
    for name, shard in places.items():
        if name not in shards[shard]:
            raise UserError(
                f"weights: {path / shard}: tensor {name}: the index places it here, "
                "and it is not here"
            )
    return {name: shards[shard][name] for name, shard in places.items()}


def _main_file(folder: Path) -> Path:
    """The index, or else the only file, of the weights in a folder."""
    for stem in STEMS:
        for ending in (INDEX, ".safetensors"):
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    for ending in (INDEX, ".safetensors"):
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"weights: {folder}: which of {names}? give the file itself"
            )
    raise UserError(
        f"weights: {folder}: no .safetensors file in it (other formats are not read)"
    )


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one file; UserError if it is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        tensors = {
            name: _stored(file, 8 + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"weights: {file}: not a readable safetensors file ({error})"
        ) from error
    for name, tensor in tensors.items():
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise UserError(
                f"weights: {file}: tensor {name}: the file is truncated ({size} of at "
                f"least {end} bytes): download or copy it again"
            )
    return tensors


def _stored(file: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its header gives {shape} {end - begin} bytes")
    return Stored(file, dtype, shape, start + begin)


class Tensor(NamedTuple):
    """A tensor to be written: what it is, before its values are there."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    path: Path, tensors: Sequence[Tensor], values: Iterator[np.ndarray]
) -> None:
    """One file, whole or not at all; `values` come in the order of `tensors`.

    Wide types should lead, so that every tensor is aligned to its own type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for _, value in zip(tensors, values, strict=False):
                if not value.flags.c_contiguous:
                    turned, value = value, np.empty(value.shape, value.dtype)
                    copy(value, turned)
                stream.write(value.reshape(-1).view(np.uint8).data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"weights: {path}: cannot be written ({error}): free some space or make "
            "its folder writable; what was there is intact"
        ) from error


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; a turned matrix tile by tile, cast as it goes.

    A tile is brought into the cache first, in rows of a width that is no power of two:
    rows of the file lie whole pages apart and would drive each other out of it. A bf16
    kernel of 9216 by 1536 takes a thirteenth of the plain assignment's time.
    """
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    rows, columns = TILE
    cached = np.empty((columns, rows + 32), source.dtype)
    for left in range(0, source.shape[1], columns):
        for top in range(0, source.shape[0], rows):
            tile = slice(top, top + rows), slice(left, left + columns)
            turned = source[tile].T
            near = cached[: turned.shape[0], : turned.shape[1]]
            near[...] = turned
            target[tile] = near.T
