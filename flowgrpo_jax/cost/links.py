"""How fast bytes reach a device from the others, by published figures.

All chips of a TPU slice are linked to their neighbours (ICI), whatever hosts they are
on; between slices they go through the data centre's network (DCN). GPUs of one host
are linked (NVLink), those of others reached through a network. A topology is one slice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowgrpo_jax.cost.flops import GB

GIGABIT = 1e9 / 8


class Links(NamedTuple):
    """Of a device: bytes per second that come in, all of them at once at most.

    `port`: through one link. `wraps`: where a side of the slice is a multiple of it, its
    two ends are linked. `network`: from another slice, or another host of GPUs.
    """

    port: float
    network: float
    wraps: int | None = None  # None: all devices of a host are linked with each other


HOST = 8  # GPUs

# A TPU chip's figure is of both directions and all ports, two on each side of its
# torus: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "Bidirectional ICI bandwidth
# per chip" 400, 1200, 800 and 1200 GB/s; "data center network" 6.4 Tb/s a pod of 256,
# 50, 25.6 Tb/s a pod of 256 and 100 Gb/s a chip. A chip of tpu7x is two devices. Slices
# of 4 x 4 x 4 and more are whole tori; of v5e and v6e a side of 16 is one
# (jax-ml.github.io/scaling-book/tpus). GPUs: NVLink of 900 GB/s in both directions and a
# port of 400 Gb/s for each (NVIDIA's datasheets of H100, H200 and their DGX).
LINKS: Mapping[str, Links] = {
    "v5e": Links(50 * GB, 25 * GIGABIT, wraps=16),
    "v5p": Links(100 * GB, 50 * GIGABIT, wraps=4),
    "v6e": Links(100 * GB, 100 * GIGABIT, wraps=16),
    "tpu7x": Links(50 * GB, 50 * GIGABIT, wraps=4),
    "H100": Links(450 * GB, 400 * GIGABIT),
    "H200": Links(450 * GB, 400 * GIGABIT),
}


class Way(NamedTuple):
    """What the bytes of one mesh axis go through: bytes per second, and its name."""

    rate: float
    name: str


def paths(
    kind: str, sides: Sequence[int], mesh: Mapping[str, int]
) -> Mapping[str, Way]:
    """The way of each mesh axis, for the device that has the fewest neighbours.

    `sides`: of the slice, or how many GPUs. All ports carry one axis at a time: no mesh
    is faster. `fsdp` lies inside a host of GPUs where it fits; `data` goes over them.
    """
    links = LINKS[kind]
    if links.wraps is not None:
        ports = sum(_neighbours(side, links.wraps) for side in sides)
        rate = ports * links.port if ports else math.inf  # one chip
        inside = Way(rate, f"ICI, {ports} ports")
        return dict.fromkeys(mesh, inside)
    near, far = Way(links.port, "NVLink"), Way(links.network, "the network of hosts")
    devices = 1
    found: dict[str, Way] = {}
    for axis in reversed([*mesh]):  # the last axis has neighbouring devices
        devices *= mesh[axis]
        found[axis] = near if devices <= HOST else far
    return found


def _neighbours(side: int, wraps: int) -> int:
    """Along one side of the slice, of a device at its end."""
    if side == 1:
        return 0
    return 2 if side % wraps == 0 and side > 2 else 1
