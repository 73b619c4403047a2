"""Chips that are not here: their mesh, and programs compiled ahead of time for them."""

import importlib.util
import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from jax.experimental import topologies

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes

_TOO_MUCH = re.compile(r"[Uu]sed ([\d.]+)([KMG]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def parse(name: str, known: Collection[str]) -> tuple[str, int]:
    """v5e:2x4 to ("v5e", 8); UserError for chips that are not known."""
    found = re.fullmatch(r"([^:]+):(\d+(?:x\d+)*)", name)
    sizes = [int(size) for size in found[2].split("x")] if found else [0]
    if not found or found[1] not in known or min(sizes) < 1:
        raise UserError(
            f"--topology: {name}: must be one of {', '.join(known)}, then how many, "
            "such as v5e:2x4 or H100:8"
        )
    return found[1], math.prod(sizes)


def make_mesh(name: str, shape: Mapping[str, int]) -> tuple[meshes.AnyMesh, str | None]:
    """The mesh of such chips and None, or an abstract one and why it is abstract."""
    kind, _, sizes = name.partition(":")
    if not kind.startswith("v"):
        why = f"programs for {kind} compile only where one is"
    elif importlib.util.find_spec("libtpu") is None:
        why = 'programs for TPU need libtpu: pip install "jax[tpu]"'
    else:
        # Another process may hold it: nothing here touches a chip.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        try:
            there = topologies.get_topology_desc(topology_name=name, platform="tpu")
        except Exception as error:  # libtpu's own, whatever their type
            reason = str(error).splitlines()[0]
            raise UserError(f"--topology: {name}: {reason}") from error
        return meshes.make_mesh(shape, there.devices), None
    count = math.prod(int(size) for size in sizes.split("x"))
    return meshes.make_abstract_mesh(shape, count), why


def compiled_bytes(lowered: Any) -> float:
    """Bytes of a device while the program runs: arguments, results and temporaries.

    Of a program that is too large too: the compiler's message tells them.
    """
    try:
        memory = lowered.compile().memory_analysis()
    except Exception as error:  # the type of XLA's errors is not public
        found = _TOO_MUCH.search(str(error))
        if not found:
            raise
        return float(found[1]) * _UNITS[found[2]]
    return float(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
