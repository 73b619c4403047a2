"""Chips by the names of `estimate`, and what other programs call them."""

import math
from dataclasses import dataclass

from flowgrpo_jax.cost import flops, topology
from flowgrpo_jax.errors import UserError

CPU = "cpu"
# The most chips of one machine.
_HOST = {"v5e": 8, "v5p": 4, "v6e": 8, "tpu7x": 4, "H100": 8, "H200": 8}
# The image of a TPU VM; for a v5e the default of some programs is that of older chips.
TPU_IMAGES = {
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclass(frozen=True)
class Chips:
    """Chips that one unit gets.

    Attributes:
      kind: v5e, v6e, H100, ... or cpu.
      count: how many chips.
      sizes: of a TPU's torus, "2x4"; else their count.
      estimated: the name for `estimate`, "" where it has no figures (cpu).
    """

    kind: str
    count: int
    sizes: str
    estimated: str

    @property
    def is_tpu(self) -> bool:
        return self.kind != CPU and flops.CHIPS[self.kind].matrix_unit is not None

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name of a TPU: a v5p's counts cores, two to a chip."""
        count = 2 * self.count if self.kind == "v5p" else self.count
        return f"{'v5litepod' if self.kind == 'v5e' else self.kind}-{count}"


def parse(name: str) -> Chips:
    """Chips of a name such as v5e:2x4, h100:8 or cpu; UserError for one there is not."""
    if name.lower() == CPU:
        return Chips(CPU, 0, "", "")
    kind, colon, sizes = name.partition(":")
    known = {chip.lower(): chip for chip in flops.CHIPS}
    spelled = f"{known.get(kind.lower(), kind)}{colon}{sizes}"
    try:
        chip, _ = topology.parse(spelled, flops.CHIPS)
    except UserError as error:
        raise UserError(f"{error}; or cpu") from error
    count = math.prod(int(size) for size in sizes.split("x"))
    return Chips(chip, count, sizes, spelled)


def one_machine(name: str, chips: Chips) -> None:
    """UserError for chips of several machines: a unit is one process today."""
    most = _HOST.get(chips.kind, chips.count)
    if chips.count > most:
        raise UserError(
            f"--topology: {name}: {chips.count} chips are several machines, and a unit "
            f"is one process today: give at most {most} of {chips.kind}"
        )
