"""The transformer of a checkpoint in one file, as ComfyUI and its makers write it.

Its tensors have the names of the code that the model was trained with, or those of
diffusers; in a checkpoint that holds a whole pipeline a prefix stands before them.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tensors, weight_folders
from flowgrpo_jax.models.files.original_names import OriginalNames, numbered
from flowgrpo_jax.models.files.tensors import Part

PREFIXES = ("", "model.diffusion_model.")
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the tensors of a transformer are.

    `parts`: of a tensor of the table, if not under its name. `prefix`: before the names
    of all of them. `others`: how the names of the tensors of other networks begin.
    """

    path: Path
    table: tensors.Table
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    others: tuple[str, ...] = ()

    def read(self, like: Any, beside: Any = None, alone: bool = True) -> dict[str, Any]:
        """The tree, in the types and at the places of `like`; see `tensors.read`.

        `beside`: another tree of the same file, whose tensors are no surprise; without
        `alone` nothing that the file holds is one.
        """
        known = tensors.names(self.table, beside or {})
        held = [self.parts[name].name if self.parts else name for name in known]
        ignore = [".*"] if not alone else [re.escape(name) for name in held]
        if self.others:
            ignore.append(f"(?!{re.escape(self.prefix)}).*")
        return tensors.read(self.path, self.table, like, ignore, self.parts)


def source(
    path: Path, table: tensors.Table, original: OriginalNames, trees: Iterable[Any]
) -> Source:
    """A file, or a folder, under the names that most of its tensors have.

    `trees`: all that the transformer has. UserError if there is no such file.
    """
    if not path.exists():
        raise UserError(f"transformer_path: {path}: no such file or folder")
    found = weight_folders.contents(path)
    shapes = {
        name: shape
        for tree in trees
        for name, shape in tensors.names(table, tree).items()
    }
    choices = [
        (prefix, parts)
        for prefix in PREFIXES
        for parts in (
            {name: Part(f"{prefix}{name}") for name in shapes},
            _parts(original, shapes, found, prefix),
        )
    ]
    # Of those that are alike the first.
    prefix, parts = max(
        choices,
        key=lambda choice: sum(part.name in found for part in choice[1].values()),
    )
    others = {name.split(".")[0] for name in found if not name.startswith(prefix)}
    return Source(path, table, parts, prefix, tuple(sorted(others)))


def _parts(
    original: OriginalNames, shapes: Shapes, found: Collection[str], prefix: str
) -> dict[str, Part]:
    """Where the tensors of diffusers are in a file of the original names.

    Where several names are in use, that which the file has, or else the first.
    """
    parts: dict[str, Part] = {}
    for name, part in _all_parts(original, shapes, prefix):
        if name not in parts or part.name in found and parts[name].name not in found:
            parts[name] = part
    return parts


def _all_parts(
    original: OriginalNames, shapes: Shapes, prefix: str
) -> Iterator[tuple[str, Part]]:
    for name, modules in numbered(original.layers, shapes):
        for kind in ("weight", "bias"):
            held = [f"{module}.{kind}" for module in modules]
            if not all(one in shapes for one in held):
                continue
            rows = list(
                itertools.accumulate((shapes[one][0] for one in held), initial=0)
            )
            for one, module, first, end in zip(
                held, modules, rows, rows[1:], strict=False
            ):
                swapped = module in original.swapped
                yield (
                    one,
                    Part(f"{prefix}{name}.{kind}", (first, end, rows[-1]), swapped),
                )
    for name, (theirs,) in numbered(original.tensors, shapes):
        yield theirs, Part(f"{prefix}{name}")
