"""Weights between our trees and the files of diffusers, transformers and PEFT.

A rename table says which tensors make one of our leaves. Two things differ beyond the
names: layers of one kind are one leaf with a leading axis here (they are scanned), and
query, key and value lie side by side. Tensors are read and placed leaf by leaf, of a
sharded leaf only the part that this host holds.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import quantized, weight_folders
from flowgrpo_jax.models.files import safetensors_files as files

# torch's order of axes to ours.
AXES = {"dense": (1, 0), "conv": (2, 3, 1, 0), "patch": (2, 3, 1, 0)}
LAYOUTS = ("same", *AXES, "grid")
ALIGNMENT = 64  # bytes
MAX_SHARD_BYTES = 10_000_000_000  # diffusers' own


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a rename table: our parameter path to tensor names in the file."""

    ours: str  # regular expression, matched with the whole '/'-joined path of a leaf
    # Template(s) with the groups of `ours` (\\1). "{layer}" runs over the leading axis
    # of our leaf; several templates lie side by side along its last axis.
    theirs: str | tuple[str, ...]
    # "same"; "dense": [out, in] to [in, out]; "conv": [out, in, h, w] to
    # [h, w, in, out]; "patch": a strided convolution as a matmul, [h * w * in, out];
    # "grid": the centre crop [row, column, width] of a table [1, grid * grid, width].
    layout: str = "same"
    first: int = 0  # number of the first layer of a scanned stack
    patch: int = 0  # side of the patches of layout "patch"
    grid: int = 0  # side of the whole table of layout "grid"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}: {', '.join(LAYOUTS)}")
        for name, side in (("patch", self.patch), ("grid", self.grid)):
            if (self.layout == name) != bool(side):
                raise ValueError(f"layout {name!r} and its side go together")

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.templates[0]


Table = Sequence[Rule]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One of our leaves and the tensors of the file that it is made of."""

    path: str
    shape: tuple[int, ...]
    rule: Rule
    names: tuple[tuple[str, ...], ...]  # [layer, part]; one layer if not stacked

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in our layout."""
        shape = self.shape[1:] if self.rule.stacked else self.shape
        parts = len(self.names[0])
        return shape if parts == 1 else (*shape[:-1], shape[-1] // parts)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in torch's layout."""
        shape = self.piece_shape
        if self.rule.layout == "same":
            return shape
        if self.rule.layout == "grid":
            return (1, self.rule.grid**2, shape[-1])
        if self.rule.layout == "patch":
            side = self.rule.patch
            shape = (side, side, shape[0] // side**2, shape[1])
        return tuple(shape[axis] for axis in np.argsort(AXES[self.rule.layout]))

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the file in our layout; a view where that is possible."""
        if self.rule.layout == "same":
            return tensor
        if self.rule.layout == "grid":
            side = self.rule.grid
            rows, columns, width = self.piece_shape
            top, left = (side - rows) // 2, (side - columns) // 2
            whole = tensor.reshape(side, side, width)
            return whole[top : top + rows, left : left + columns]
        return tensor.transpose(AXES[self.rule.layout]).reshape(self.piece_shape)

    def theirs(self, value: np.ndarray, layer: int, part: int) -> np.ndarray:
        """One tensor, in torch's layout, out of the values of the whole leaf."""
        if self.rule.stacked:
            value = value[layer]
        if len(self.names[0]) > 1:
            width = self.piece_shape[-1]
            value = value[..., part * width : (part + 1) * width]
        if self.rule.layout == "same":
            return value
        if self.rule.layout == "grid":
            return value.reshape(self.file_shape)  # of a crop there is no way back
        order = np.argsort(AXES[self.rule.layout])
        if self.rule.layout == "patch":
            value = value.reshape([self.file_shape[axis] for axis in AXES["patch"]])
        return value.transpose(order)


def _leaves(table: Table, like: Any) -> dict[str, _Leaf]:
    """Every leaf of `like` with its rule, by path."""
    flat = traverse_util.flatten_dict(like, sep="/")
    return {path: _leaf(table, path, tuple(leaf.shape)) for path, leaf in flat.items()}


def _leaf(table: Table, path: str, shape: tuple[int, ...]) -> _Leaf:
    for rule in table:
        if match := re.fullmatch(rule.ours, path):
            patterns = [match.expand(template) for template in rule.templates]
            layers = range(shape[0]) if rule.stacked else (0,)
            names = tuple(
                tuple(p.replace("{layer}", str(rule.first + n)) for p in patterns)
                for n in layers
            )
            return _Leaf(path, shape, rule, names)
    raise ValueError(f"{path}: no row of the rename table matches it")


def names(table: Table, like: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a tree like this has in the file."""
    return {
        name: leaf.file_shape
        for leaf in _leaves(table, like).values()
        for layer in leaf.names
        for name in layer
    }


class Part(NamedTuple):
    """The rows of a tensor of a file that a tensor of a table is; all of them for None.

    `rows`: first, end and how many there are. `swapped`: of its halves the second one
    comes first in the file.
    """

    name: str
    rows: tuple[int, int, int] | None = None
    swapped: bool = False


def read(
    path: str | Path,
    table: Table,
    like: Any,
    ignore: Sequence[str] = (),
    parts: Mapping[str, Part] | None = None,
) -> dict[str, Any]:
    """The tree of a .safetensors file or of a folder, in the types of `like`.

    `like` is a tree of jax.ShapeDtypeStruct: a leaf with a sharding is placed there
    and only this host's part of it is read, others stay numpy. `parts`: where tensors
    of the table are, if not under their names. UserError, naming the tensor, if one is
    missing, damaged or of another shape, or if the file has one that no leaf takes and
    no regular expression of `ignore` matches.
    """
    flat = dict(leaves(path, table, like, ignore, parts))
    return traverse_util.unflatten_dict(flat, sep="/")


def leaves(
    path: str | Path,
    table: Table,
    like: Any,
    ignore: Sequence[str] = (),
    parts: Mapping[str, Part] | None = None,
) -> Iterator[tuple[str, Any]]:
    """The leaves that `read` makes a tree of, with their paths, one after the other."""
    made, wanted = _leaves(table, like), names(table, like)
    places = {name: Part(name) for name in wanted} | dict(parts or {})
    held = dict.fromkeys(places[name].name for name in wanted)
    stored = quantized.with_scales(weight_folders.contents(path), held)
    found = {}
    for name, shape in wanted.items():
        part = places[name]
        if part.name not in stored:
            missing = f"missing{_instead(part.name, stored)}"
            raise UserError(f"weights: {path}: tensor {part.name}: {missing}")
        found[name] = _cut(stored[part.name], part, shape, path)
    for name in stored.keys() - held.keys():
        if not any(re.fullmatch(pattern, name) for pattern in ignore):
            raise UserError(
                f"weights: {path}: tensor {name}: nothing in the network takes it; is "
                "this the folder that the configuration describes?"
            )
    for file in {found[name].file for name in wanted}:
        files.check_sum(file)
    targets = traverse_util.flatten_dict(like, sep="/")
    with ThreadPoolExecutor(_threads()) as pool:
        for key, leaf in made.items():
            yield key, _place(leaf, targets[key], found, pool)


def _cut(
    tensor: files.Stored, part: Part, shape: tuple[int, ...], path: str | Path
) -> files.Stored:
    """The part, of this shape, of a tensor; UserError if the tensor is of another."""
    whole = (part.rows[-1], *shape[1:]) if part.rows else shape
    if tensor.shape != whole:
        raise UserError(
            f"weights: {path}: tensor {part.name}: shape {list(tensor.shape)}: the "
            f"configuration asks for {list(whole)}"
        )
    if part.rows:
        tensor = tensor.rows(*part.rows[:2])
    return tensor._replace(name=part.name, swapped=part.swapped)


def _instead(name: str, found: Mapping[str, Any]) -> str:
    """What the file has in place of a tensor, if anything is like it."""
    for other in found:
        if prefix := other.removesuffix(name) if other != name else "":
            if prefix.endswith("."):
                return f"; there it is called {other}: take {prefix!r} off all names"
    first = min(found, default="nothing")
    return f"; the first tensor that is there is {first}"


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _place(
    leaf: _Leaf, target: Any, found: dict[str, files.Stored], pool: Executor
) -> Any:
    """One leaf in the memory that it is for."""
    everything = (slice(None),) * len(leaf.shape)
    if getattr(target, "sharding", None) is None:
        return _part(leaf, everything, np.dtype(target.dtype), found, pool)
    # Devices that hold the same part share what is read.
    parts: dict[tuple, np.ndarray] = {}

    def part(index):
        key = tuple(
            span.indices(size) for span, size in zip(index, leaf.shape, strict=True)
        )
        if key not in parts:
            parts[key] = _part(leaf, index, np.dtype(target.dtype), found, pool)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, target.sharding, part)


def _part(
    leaf: _Leaf,
    index: tuple[slice, ...],
    dtype: np.dtype,
    found: dict[str, files.Stored],
    pool: Executor,
) -> np.ndarray:
    """The part of a leaf that `index` cuts out of it, read from the file."""
    spans = [range(n)[cut] for cut, n in zip(index, leaf.shape, strict=True)]
    out = _aligned(tuple(len(span) for span in spans), dtype)
    layers = spans[0] if leaf.rule.stacked else (0,)
    inner = index[1:] if leaf.rule.stacked else index
    copies = []
    for row, layer in enumerate(layers):
        target = out[row] if leaf.rule.stacked else out
        if len(leaf.names[layer]) == 1:
            copies.append((target, leaf.names[layer][0], inner))
            continue
        width, start, end = leaf.piece_shape[-1], spans[-1].start, spans[-1].stop
        for number, name in enumerate(leaf.names[layer]):
            low, high = max(start, number * width), min(end, (number + 1) * width)
            if low < high:
                cut = slice(low - number * width, high - number * width)
                part = target[..., low - start : high - start]
                copies.append((part, name, (*inner[:-1], cut)))

    def copy(target, name, index, rows):
        tensor, scale = found[name], None
        piece = np.asarray(leaf.ours(tensor.map())[index])  # scalars are no arrays
        if tensor.scale is not None:
            scale = leaf.ours(tensor.whole_scale())[index][rows]
        files.copy(target[rows], piece[rows], scale)
        if not _finite(target[rows]):
            raise UserError(
                f"weights: {tensor.file}: tensor {tensor.name}: holds values that are "
                f"not finite in {dtype}: download or make the file again"
            )

    # A tensor that is alone is shared out among the threads by its rows.
    shares: list[Any] = [...]
    if len(copies) == 1 and copies[0][0].ndim:
        length = len(copies[0][0])
        step = max(1, math.ceil(length / _threads()))
        shares = [slice(start, start + step) for start in range(0, length, step)]
    work = [(*arguments, rows) for arguments in copies for rows in shares]
    list(pool.map(lambda arguments: copy(*arguments), work))
    return out


def _finite(values: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity.

    Those have the largest exponent: as whole numbers they are the largest of all, with
    either sign. isfinite takes ten times as long for bf16.
    """
    if not values.size or not jnp.issubdtype(values.dtype, np.floating):
        return True
    size, told = values.dtype.itemsize, jnp.finfo(values.dtype)
    least = ((1 << told.nexp) - 1) << told.nmant
    positive, both = (int(values.view(f"{kind}{size}").max()) for kind in "iu")
    return positive < least and both < least + (1 << (8 * size - 1))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes as it is; any other it would copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def write(
    path: str | Path,
    tree: Any,
    table: Table,
    config: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """The tree under the file's names: one .safetensors file, or a folder.

    A folder gets shards with an index once it needs several, and `config` as its
    config.json; one with a `_class_name` is named as diffusers does, others as
    transformers does. What `read` makes of it is the same bit for bit.
    """
    leaves = _leaves(table, tree)
    flat = traverse_util.flatten_dict(tree, sep="/")
    # Wide types first: see write_file. Leaf by leaf: a stack is fetched once.
    order = sorted(leaves, key=lambda key: -np.dtype(flat[key].dtype).itemsize)
    tensors = [
        files.Tensor(name, np.dtype(flat[key].dtype), leaves[key].file_shape)
        for key in order
        for layer in leaves[key].names
        for name in layer
    ]
    values = _values([(leaves[key], flat[key]) for key in order])
    path = Path(path)
    if path.suffix == ".safetensors":
        files.write_file(path, tensors, values)
        return
    path.mkdir(parents=True, exist_ok=True)
    stem = weight_folders.STEMS[0 if config and "_class_name" in config else 1]
    shards = _shards(tensors, max_shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        places |= {tensor.name: f"{stem}{several}.safetensors" for tensor in shard}
        files.write_file(path / f"{stem}{several}.safetensors", shard, values)
    if len(shards) > 1:
        size = sum(tensor.size for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (path / f"{stem}{weight_folders.INDEX}").write_text(json.dumps(index, indent=2))
    else:  # that of an earlier write would be followed
        (path / f"{stem}{weight_folders.INDEX}").unlink(missing_ok=True)
    for old in path.glob(f"{stem}*.safetensors"):
        if old.name not in places.values():
            old.unlink()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _values(leaves: list[tuple[_Leaf, Any]]) -> Iterator[np.ndarray]:
    """All tensors in torch's layout; one leaf at a time is on the host."""
    for leaf, value in leaves:
        host = np.asarray(value)
        for layer, parts in enumerate(leaf.names):
            for part in range(len(parts)):
                yield leaf.theirs(host, layer, part)


def _shards(tensors: list[files.Tensor], most: int) -> list[list[files.Tensor]]:
    """Tensors in order, in files of at most so many bytes (or one tensor)."""
    shards: list[list[files.Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards
