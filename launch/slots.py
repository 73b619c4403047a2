"""The device sets of this machine: what each of several units at once may use."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flowgrpo_jax.errors import UserError
from launch.unit import CPUS

# How libtpu wants the shape of so many neighbouring chips of one host.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_PORT = 8476  # of the first unit's TPU runtime; each unit has one of its own


@dataclass(frozen=True)
class Slot:
    """Devices of one unit at a time, and the variables that give it these alone."""

    name: str
    variables: dict[str, str]


def of_this_machine(count: int) -> list[Slot]:
    """`count` slots with as many devices each; UserError if there are not enough.

    GPUs where there are some, else TPU chips, else cores of the CPU. Devices that are
    left over are not used: units of one sweep are to be alike.
    """
    kind, devices = _devices()
    each = len(devices) // count
    if not each:
        raise UserError(
            f"--max_parallel: {count}: this machine has {len(devices)} {kind}, and a "
            f"unit needs one: give at most {len(devices)}"
        )
    if kind == "TPU chips" and each not in _TPU_BOUNDS:
        raise UserError(
            f"--max_parallel: {count}: would give each unit {each} TPU chips: must "
            f"leave it {', '.join(map(str, _TPU_BOUNDS))}"
        )
    parts = [devices[first * each : (first + 1) * each] for first in range(count)]
    return [_slot(kind, part, number) for number, part in enumerate(parts)]


def _slot(kind: str, devices: list[str], number: int) -> Slot:
    listed = ",".join(devices)
    if kind == "GPUs":
        variables = {"CUDA_VISIBLE_DEVICES": listed}
    elif kind == "TPU chips":
        variables = {
            "TPU_VISIBLE_CHIPS": listed,
            "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[len(devices)],
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{_PORT + number}",
            "TPU_MESH_CONTROLLER_PORT": str(_PORT + number),
        }
    else:
        variables = {CPUS: listed}
    return Slot(f"{kind} {listed}", variables)


def _devices() -> tuple[str, list[str]]:
    """(kind, names) of what this process may use; JAX would take them to tell."""
    if gpus := _gpus():
        return "GPUs", gpus
    if chips := _tpu_chips():
        return "TPU chips", chips
    return "CPU cores", [str(core) for core in sorted(os.sched_getaffinity(0))]


def _gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or given == "":
        return []
    if given is not None:
        return given.split(",")
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()


def _tpu_chips(devices: Path = Path("/dev")) -> list[str]:
    """Chips of a TPU VM: /dev/accel0, ... or, on newer ones, /dev/vfio/0, ..."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    found = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    return [str(number) for number in range(len(found))]
