"""How a checkpoint as it was first released names what diffusers names otherwise.

Its layers may be several of diffusers' side by side (query, key and value). A family has
a table of them (`models/<family>/original_names.py`), which serves checkpoints in one
file and LoRA files alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class OriginalNames:
    """How the checkpoint as it was released names the layers of a family.

    Args:
      layers: linear ones: its name -> that of diffusers, or those that lie side by side
        in it; "{layer}" is the number of a block in both.
      swapped: layers of diffusers, of two halves, that come second half first there.
      tensors: the same of single tensors that belong to no linear layer.
    """

    layers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    tensors: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


NO_NAMES = OriginalNames()


def block_names(
    original: str, theirs: str, layers: Mapping[str, str | tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """`OriginalNames.layers` of a table that speaks of one block, or of no block.

    `original`, `theirs`: what stands before the names there and in diffusers.
    """
    return {
        f"{original}{name}": tuple(
            f"{theirs}{part}"
            for part in ((parts,) if isinstance(parts, str) else parts)
        )
        for name, parts in layers.items()
    }


def numbered(
    names: Mapping[str, tuple[str, ...]], known: Iterable[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original name, names in diffusers), with "{layer}" as each number in `known`."""
    numbers = {part for name in known for part in name.split(".") if part.isdigit()}
    for name, theirs in names.items():
        for number in numbers if "{layer}" in name else {""}:
            yield (
                name.replace("{layer}", number),
                tuple(one.replace("{layer}", number) for one in theirs),
            )
