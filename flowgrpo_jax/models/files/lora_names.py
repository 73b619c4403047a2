"""The names that writers of LoRA files give to the layers of a transformer.

A file follows diffusers' names or those of the checkpoint as it was first released,
whose layers may be several of diffusers' side by side (query, key and value). Either
stand there as they are, behind one of several prefixes, or, as kohya writes them, with
every dot an underscore. A family says how its checkpoint names its layers
(`original_names`); what follows from that is the same for all.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files.lora_files import Factors
from flowgrpo_jax.models.files.original_names import NO_NAMES, OriginalNames, numbered

# Before the name of a layer: of diffusers' part, of PEFT's wrap, of ComfyUI's and of
# torch.compile's.
_PREFIXES = (
    *("transformer.", "base_model.model.", "_orig_mod."),
    *("diffusion_model.", "model.diffusion_model."),
)
# Before a name in which dots are underscores: kohya's, OneTrainer's, LyCORIS's.
_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")


def plain(name: str) -> str:
    """A layer's name in a file without the prefixes of those who wrote it."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


class _Meaning(NamedTuple):
    """The layers of diffusers that a name stands for, and whether halves are swapped."""

    modules: tuple[str, ...]
    swapped: bool


class LayerNames:
    """All names by which files may call the linear layers of one transformer."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        original: OriginalNames = NO_NAMES,
    ):
        """`shapes`: [out, in] of every linear layer, by its name in diffusers."""
        self._shapes = shapes
        own = {name: _Meaning((name,), False) for name in shapes}
        self._dotted = _expanded(shapes, original) | own
        self._joined = {
            name.replace(".", "_"): self._dotted[name] for name in self._dotted
        }

    def split(
        self, name: str, factors: Factors, where: str
    ) -> Iterator[tuple[str, Factors]]:
        """(layer of diffusers, its factors) of a layer of a file, by its plain name.

        Layers that lie side by side share A and have rows of B of their own. UserError
        for a layer that the transformer does not have, or has in another shape.
        """
        modules, swapped = self._find(name, where)
        sizes = [self._shapes[module][0] for module in modules]
        wanted = [sum(sizes), self._shapes[modules[0]][1]]
        found = [factors.b.shape[0], factors.a.shape[1]]
        if found != wanted:
            raise UserError(
                f"{where}: {name}: lora_A and lora_B are for a matrix of {found}: this "
                f"transformer's is {wanted}"
            )
        starts = np.cumsum([0, *sizes])
        for module, start, size in zip(modules, starts, sizes, strict=False):
            b = factors.b[start : start + size]
            if swapped:
                b = np.roll(b, size // 2, axis=0)
            part = factors._replace(b=b)
            yield module, part if len(modules) == 1 else _without_idle(part)

    def _find(self, name: str, where: str) -> _Meaning:
        begin = next((prefix for prefix in _JOINED if name.startswith(prefix)), "")
        index = self._joined if begin else self._dotted
        if meaning := index.get(name.removeprefix(begin)):
            return meaning
        raise UserError(
            f"{where}: {name}: this transformer has no linear layer of that name: is "
            f"the file for another model? (they are like {next(iter(self._shapes))})"
        )


def _expanded(
    shapes: Mapping[str, tuple[int, ...]], original: OriginalNames
) -> dict[str, _Meaning]:
    """Every layer of the original checkpoint that the transformer has, by its name."""
    return {
        name: _Meaning(modules, modules[0] in original.swapped)
        for name, modules in numbered(original.layers, shapes)
        if all(module in shapes for module in modules)
    }


def _without_idle(factors: Factors) -> Factors:
    """Without the components that add nothing to this one of several layers.

    A writer that trains them apart joins them with zeros in all B but a layer's own.
    """
    used = factors.b.any(axis=0)
    if not used.any():  # nothing is trained yet: which are its own does not show
        return factors
    return factors._replace(a=factors.a[used], b=factors.b[:, used])
