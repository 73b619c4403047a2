"""Chips that are not here: their mesh, and programs compiled ahead of time for them."""

import importlib.util
import math
import os
import re
import signal
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jax.experimental import topologies

from flowgrpo_jax.cost import links
from flowgrpo_jax.cost.links import Way
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes

# Sizes of a TPU's torus; other chips have one number.
_TORUS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_ALIASES = {"v7x": "tpu7x"}  # the compiler knows the second one
# Two to a chip: its TensorCores are devices of their own, unlike those of a v5p.
_DEVICES_PER_CHIP = {"tpu7x": 2}
_MOST = 2**14  # devices; the largest pod has 9,216 chips
# A slice that is smaller than a host of 2 x 2 chips must say how large its host is.
_HOST = 2
# How libtpu 0.0.42 tells what a program that it refuses would need, arguments included.
_SIZES = (
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of"),
    re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT])\)"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What compilers say of memory, whatever else: XLA's status, libtpu's own words.
_NO_ROOM = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|HbmOom|exceed\w* (available|capacity|hbm)",
    re.IGNORECASE,
)


class DoesNotFit(Exception):
    """The compiler refuses a program for its memory and does not tell how much."""


def parse(name: str, known: Collection[str]) -> tuple[str, int]:
    """v5e:2x4 to ("v5e", 8), chip and devices; UserError for what is not known."""
    kind, sizes = _split(name)
    if kind not in known or not sizes or min(sizes) < 1:
        raise UserError(
            f"--topology: {name}: must be one of {', '.join(known)}, then how many, "
            "such as v5e:2x4 or H100:8"
        )
    if len(sizes) != _TORUS.get(kind, 1):
        like = f"{kind}:{'x'.join('2' * _TORUS.get(kind, 1))}"
        raise UserError(f"--topology: {name}: must look like {like}")
    count = math.prod(sizes) * _DEVICES_PER_CHIP.get(kind, 1)
    if count > _MOST:
        raise UserError(f"--topology: {name}: {count:,} devices: at most {_MOST:,}")
    return kind, count


def paths(name: str, mesh: meshes.AnyMesh) -> Mapping[str, Way]:
    """The way of each mesh axis between chips that `parse` takes."""
    kind, sizes = _split(name)
    return links.paths(kind, sizes, dict(mesh.shape))


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    kind, _, rest = name.partition(":")
    fits = re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", rest, re.ASCII)
    sizes = tuple(int(size) for size in rest.split("x")) if fits else ()
    return _ALIASES.get(kind, kind), sizes


def make_mesh(name: str, shape: Mapping[str, int]) -> tuple[meshes.AnyMesh, str | None]:
    """The mesh of chips that `parse` takes, or an abstract one and why it is abstract."""
    kind, sizes = _split(name)
    if kind not in _TORUS:
        why = f"programs for {kind} compile only where one is"
    elif importlib.util.find_spec("libtpu") is None:
        why = 'programs for TPU need libtpu: pip install "jax[tpu]"'
    else:
        return meshes.make_mesh(shape, _devices(name, kind, sizes)), None
    count = math.prod(sizes) * _DEVICES_PER_CHIP.get(kind, 1)
    return meshes.make_abstract_mesh(shape, count), why


def _devices(name: str, kind: str, sizes: tuple[int, ...]) -> Any:
    """libtpu's devices of chips that are not here; nothing touches one that is."""
    # Another process may hold a chip of this machine.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    options = {}
    if max(sizes) <= _HOST and math.prod(sizes[:2]) < _HOST**2:
        options["chips_per_host_bounds"] = (*sizes, 1)[:3]
    try:
        there = topologies.get_topology_desc(
            topology_name=f"{kind}:{'x'.join(map(str, sizes))}",
            platform="tpu",
            **options,
        )
    except Exception as error:  # libtpu's own, whatever their type
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology: {name}: {reason}: the first two sizes must be even, or it is "
            f"one chip, {kind}:{'x'.join('1' * len(sizes))}"
        ) from error
    # libtpu answers SIGTERM with a stack of its own; a compilation has nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return there.devices


class Compiled(NamedTuple):
    """`bytes` of a device while a program runs, and the `text` of its HLO.

    Bytes are arguments, results and temporaries. There is no text of a program that is
    too large.
    """

    bytes: float
    text: str = ""


def compiled(lowered: Any) -> Compiled:
    """What the compiler makes of a program, and of one that is too large its bytes.

    `DoesNotFit` with the first line of its message if that does not tell them.
    """
    try:
        program = lowered.compile()
    except Exception as error:  # the type of XLA's errors is not public
        text = str(error)
        for pattern in _SIZES:
            if found := pattern.search(text):
                return Compiled(float(found[1]) * _UNITS[found[2]])
        if _NO_ROOM.search(text):
            raise DoesNotFit(text.strip().splitlines()[0]) from error
        raise
    memory = program.memory_analysis()
    size = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(float(size), program.as_text())
