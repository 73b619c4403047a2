"""Safetensors files as they lie on disk: where a tensor is, and writing one by one.

The library's numpy side knows no bfloat16 slices and writes all tensors of a file from
memory at once. The format is a length, a JSON header and raw bytes, so that reading is
a memory map of one tensor and writing needs no more memory than one tensor.

What is written here carries a checksum of all its bytes in its header's metadata, where
other readers pass it by; what carries one is checked before it is used.
"""

import functools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json

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
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TILE = 256, 512  # rows and columns of a turned matrix that are copied at once
_METADATA, _CHECKSUM = "__metadata__", "flowgrpo_jax.crc32"
_NO_SUM = "00000000"  # stands in the header while the sum is made
_MOST_HEADER = 100_000_000  # bytes; the library's own limit
_MOST_SIDE = 2**31
_CHUNK = 2**24
GGUF = (
    "a gguf file, which is not read: save it as bf16 with diffusers, in Python: "
    'CLASS.from_single_file(FILE, config=FOLDER, subfolder="transformer", '
    "quantization_config=GGUFQuantizationConfig(torch.bfloat16)).dequantize()"
    ".save_pretrained(NEW), where CLASS is the _class_name in "
    "FOLDER/transformer/config.json"
)


class Stored(NamedTuple):
    """Where one tensor lies, or some of its rows."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    name: str = ""  # for messages
    # What its numbers are multiplied with, [1, ...] or [row, 1, ...]; see `quantized`.
    scale: np.ndarray | None = None
    swapped: bool = False  # of its rows the second half comes first in the file

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor, read from disk where it is touched and when it is touched."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,))
        return self._in_order(mapped.reshape(self.shape))

    def whole_scale(self) -> np.ndarray:
        """The scale, of the tensor's shape."""
        assert self.scale is not None
        return self._in_order(np.broadcast_to(self.scale, self.shape))

    def _in_order(self, values: np.ndarray) -> np.ndarray:
        return np.roll(values, len(values) // 2, axis=0) if self.swapped else values

    def rows(self, first: int, end: int) -> "Stored":
        """Its rows first ... end, without the last: they lie together in the file."""
        row = self.size // self.shape[0] if self.shape[0] else 0
        scale = self.scale
        if scale is not None and len(scale) > 1:
            scale = scale[first:end]
        return self._replace(
            shape=(end - first, *self.shape[1:]),
            offset=self.offset + first * row,
            scale=scale,
        )


class Contents(NamedTuple):
    """What the header of a file tells."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(file: Path) -> Contents:
    """The header of one file; UserError if it is damaged, or is no such file.

    As strict as the library itself: tensors lie one after the other, without holes, and
    fill the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if config_json.is_pointer(start + stream.read(100)):
                raise UserError(f"weights: {file}: {config_json.POINTER}")
            if start.startswith(b"GGUF"):
                raise UserError(f"weights: {file}: {GGUF}")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError("its header is longer than the file")
            stream.seek(8)
            text = stream.read(length)
        if not text.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        header = json.loads(text.decode(), object_pairs_hook=_once)
        metadata = header.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not all texts")
        tensors = {
            name: _stored(file, 8 + length, entry) for name, entry in header.items()
        }
    except OSError as error:
        raise UserError(f"weights: {file}: cannot be read ({error.strerror})") from None
    except (
        *(struct.error, ValueError, KeyError, TypeError, AttributeError),
        *(RecursionError, OverflowError),
    ) as error:
        raise UserError(
            f"weights: {file}: not a readable safetensors file ({error})"
        ) from error
    _check_places(file, tensors, 8 + length, size)
    return Contents(tensors, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as strict as the library: no half characters, each name once."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in its header")
    for name, value in pairs:  # half a character, which JSON's \\u can write
        f"{name}{value if isinstance(value, str) else ''}".encode()
    return found


def _stored(file: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"numbers of type {entry['dtype']} are not read")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n for n in (*shape, begin, end)):
        raise ValueError(f"its header gives the shape {shape}, bytes {begin} to {end}")
    if max(shape, default=0) > _MOST_SIDE:
        raise ValueError(f"its header gives the shape {shape}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its header gives {shape} {end - begin} bytes")
    return Stored(file, dtype, shape, start + begin)


def _check_places(
    file: Path, tensors: Mapping[str, Stored], start: int, size: int
) -> None:
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        end = tensor.offset + tensor.size
        if end > size:
            raise UserError(
                f"weights: {file}: tensor {name}: the file is truncated ({size} of at "
                f"least {end} bytes): download or copy it again"
            )
        if tensor.offset != start and tensor.size:
            raise UserError(
                f"weights: {file}: tensor {name}: not a readable safetensors file (it "
                f"begins at byte {tensor.offset}, the one before ends at {start})"
            )
        start = max(start, end)
    if start != size:
        raise UserError(
            f"weights: {file}: not a readable safetensors file (its tensors end at byte "
            f"{start}, the file at {size})"
        )


def check_sum(file: Path) -> None:
    """UserError if a file that was written here is not as it was written."""
    stat = file.stat()
    _check_sum(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(256)  # parts of a file are read one by one
def _check_sum(file: Path, size: int, changed: int) -> None:
    told = read_header(file).metadata.get(_CHECKSUM)
    if told is None:
        return
    with file.open("rb") as stream:
        start = stream.read(8)
        text = stream.read(*struct.unpack("<Q", start))
        sum_ = zlib.crc32(start + text.replace(_entry(told), _entry(_NO_SUM), 1))
        while part := stream.read(_CHUNK):
            sum_ = zlib.crc32(part, sum_)
    if f"{sum_:08x}" != told:
        raise UserError(
            f"weights: {file}: damaged: its bytes are not those that were written "
            "(checksum): copy or make it again"
        )


def _entry(sum_: str) -> bytes:
    """The checksum as it stands in the header."""
    return f'"{_CHECKSUM}":"{sum_}"'.encode()


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
    path: Path,
    tensors: Sequence[Tensor],
    values: Iterator[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One file, whole or not at all; `values` come in the order of `tensors`.

    Wide types should lead, so that every tensor is aligned to its own type. `metadata`
    is what the header tells beside them.
    """
    told = dict(metadata or {"format": "pt"}) | {_CHECKSUM: _NO_SUM}
    header: dict[str, Any] = {_METADATA: told}
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
    start = struct.pack("<Q", len(text)) + text
    sum_ = zlib.crc32(start)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(start)
            for _, value in zip(tensors, values, strict=False):
                if not value.flags.c_contiguous:
                    turned, value = value, np.empty(value.shape, value.dtype)
                    copy(value, turned)
                data = value.reshape(-1).view(np.uint8).data
                sum_ = zlib.crc32(data, sum_)
                stream.write(data)
            stream.seek(0)
            stream.write(start.replace(_entry(_NO_SUM), _entry(f"{sum_:08x}"), 1))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"weights: {path}: cannot be written ({error}): free some space or make "
            "its folder writable; what was there is intact"
        ) from error


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """A dict of arrays of one type as one file."""
    tensors = [Tensor(name, arr.dtype, arr.shape) for name, arr in arrays.items()]
    write_file(path, tensors, iter(arrays.values()), metadata)


def copy(
    target: np.ndarray, source: np.ndarray, scale: np.ndarray | None = None
) -> None:
    """target[...] = source; a turned matrix tile by tile, cast as it goes.

    With a `scale` of the same shape their product, made in fp32.

    A tile is brought into the cache first, in rows of a width that is no power of two:
    rows of the file lie whole pages apart and would drive each other out of it. A bf16
    kernel of 9216 by 1536 takes a thirteenth of the plain assignment's time.
    """
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = _scaled(source, scale)
        return
    rows, columns = TILE
    cached = np.empty((columns, rows + 32), source.dtype)
    for left in range(0, source.shape[1], columns):
        for top in range(0, source.shape[0], rows):
            tile = slice(top, top + rows), slice(left, left + columns)
            turned = source[tile].T
            near = cached[: turned.shape[0], : turned.shape[1]]
            near[...] = turned
            target[tile] = _scaled(near.T, None if scale is None else scale[tile])


def _scaled(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    return values if scale is None else values.astype(np.float32) * scale
