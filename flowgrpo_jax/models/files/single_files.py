"""The transformer of a checkpoint in one file, as ComfyUI and its makers write it.

Its tensors have the names of the code that the model was trained with, or those of
diffusers; in a checkpoint that holds a whole pipeline a prefix stands before them.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tensors, weight_folders

PREFIXES = ("", "model.diffusion_model.")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the tensors of a transformer are, and under which names.

    `others`: how the names of tensors begin that belong to other networks.
    """

    path: Path
    table: tensors.Table
    prefix: str = ""
    others: tuple[str, ...] = ()

    def read(self, like: Any, beside: Any = None, alone: bool = True) -> dict[str, Any]:
        """The tree, in the types and at the places of `like`; see `tensors.read`.

        `beside`: another tree of the same file, whose tensors are no surprise; without
        `alone` nothing that the file holds is one.
        """
        known = tensors.names(self.table, beside or {})
        ignore = [re.escape(name) for name in map(tensors.stored_name, known)]
        if self.others:
            ignore.append(f"(?!{re.escape(self.prefix)}).*")
        return tensors.read(self.path, self.table, like, ignore if alone else [".*"])


def source(path: Path, tables: Sequence[tensors.Table], like: Any) -> Source:
    """The file, or folder, by the one of the tables that most of its names are in.

    `like`: the tree of the transformer. UserError if there is no such file.
    """
    if not path.exists():
        raise UserError(f"transformer_path: {path}: no such file or folder")
    found = weight_folders.contents(path)
    hits = []
    for number, table in enumerate(tables):
        wanted = [tensors.stored_name(name) for name in tensors.names(table, like)]
        for prefix in PREFIXES:
            count = sum(f"{prefix}{name}" in found for name in wanted)
            hits.append((count, -number, prefix))
    _, number, prefix = max(hits)  # of those that are alike the first table
    table = tables[-number]
    others = {name.split(".")[0] for name in found if not name.startswith(prefix)}
    return Source(path, _prefixed(table, prefix), prefix, tuple(sorted(others)))


def _prefixed(table: tensors.Table, prefix: str) -> tensors.Table:
    return [
        dataclasses.replace(
            rule, theirs=tuple(f"{prefix}{template}" for template in rule.templates)
        )
        for rule in table
    ]
