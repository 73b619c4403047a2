"""The environment of a run: device, instruction set, versions, commit.

The same command gives the same bits on one kind of chip with one set of versions. So a
workdir records its environments, each with the first iteration that ran in it:

    environment.json    [{"from_iteration": 0, "environment": {...}, "mesh": {...}}, ...]

The mesh too: it changes no sample, but the order in which an update adds up.
"""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.workdir import atomic_write, parse_json

_FILE = "environment.json"
PACKAGES = (
    *("flowgrpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    "transformers",
)
# The CPU flags that decide how XLA computes a sum of products.
_INSTRUCTIONS = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
# The number of cores is that of devices, which changes no digit.
_NO_MATTER = ("cores", "devices")


def environment() -> dict[str, Any]:
    """What this process runs on."""
    device = jax.devices()[0]
    name, instructions = cpu()
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": name,
        "instructions": " ".join(instructions),
        "cores": len(os.sched_getaffinity(0)),
        "xla_flags": _other_flags(os.environ.get("XLA_FLAGS", "")),
        "python": platform.python_version(),
        **versions(),
        "commit": commit(Path(__file__).parents[2]),
    }


def of_hosts() -> dict[str, Any]:
    """What must be the same on all hosts of a run, for the same bits on any of them."""
    own = {*_NO_MATTER, "cpu"}
    return {key: value for key, value in environment().items() if key not in own}


def record(
    workdir: Path, from_iteration: int, mesh: Mapping[str, int] | None = None
) -> str:
    """Records this process's environment; returns a line if the last one differs.

    `mesh`: its axes and their sizes, of which no line is made.
    Entries of later iterations are removed, since those iterations will run again.
    """
    path, now = workdir / _FILE, environment()
    entries = [e for e in history(workdir) if e["from_iteration"] < from_iteration]
    changes = differences(entries[-1]["environment"], now) if entries else []
    entry = {"from_iteration": from_iteration, "environment": now}
    entry |= {"mesh": dict(mesh)} if mesh else {}
    if not entries or changes or entries[-1].get("mesh") != entry.get("mesh"):
        entries.append(entry)
    atomic_write(path, json.dumps(entries, indent=2) + "\n")
    if not changes:
        return ""
    return (
        f"environment: from iteration {from_iteration} on another one "
        f"({'; '.join(changes)}): rows from here on are no longer equal to the bit to "
        "those of an undisturbed run"
    )


def history(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a workdir, the earliest first; empty if it has no such file."""
    path = workdir / _FILE
    try:
        entries = parse_json(path.read_text()) if path.exists() else []
        for entry in entries:
            int(entry["from_iteration"]), dict(entry["environment"])
            dict(entry.get("mesh", {}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"workdir: {path}: cannot be read ({error}): delete it: what the run was "
            "made on is then unknown"
        ) from error
    return entries


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Texts such as `jax 0.10.2 -> 0.11.0`, for everything that may change a digit."""
    return [
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in dict.fromkeys([*new, *old])
        if name not in _NO_MATTER and old.get(name) != new.get(name)
    ]


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Versions by package; None for one that is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return None


def cpu(info: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """Name of the CPU, and those of its instructions that XLA may use."""
    fields: dict[str, str] = {}
    try:
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    except OSError:  # no Linux
        return platform.processor() or platform.machine(), ()
    flags = set(fields.get("flags", fields.get("features", "")).split())
    name = fields.get("model name") or platform.machine()
    return name, tuple(one for one in _INSTRUCTIONS if one in flags)


def _other_flags(flags: str) -> str:
    """The flags without the number of devices, which is that of the cores."""
    own = "--xla_force_host_platform_device_count"
    return " ".join(sorted(one for one in flags.split() if not one.startswith(own)))


@functools.cache
def commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with "-dirty" if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return None  # installed below somebody else's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
