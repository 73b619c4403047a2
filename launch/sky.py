"""Runs a sweep on any cloud by SkyPilot: a managed job for each unit, on spot machines.

python -m launch.sky --config=configs/geneval.py:model=sd3.5-medium \\
  --sweep=launch/sweeps/seeds.py --topology=h100:8 --bucket=gs://BUCKET/runs

It writes a task file for each unit, ROOT/XID/sky/WID.yaml, and starts `sky jobs launch`
with it. The workdirs are in the bucket, so a job that SkyPilot starts again after a
preemption goes on from its checkpoint. --dry_run prints the commands only. A unit is one
process on one machine today.
"""

from typing import Any

import yaml  # type: ignore[import-untyped]
from absl import flags

from flowgrpo_jax.errors import UserError
from launch import command, remote, topologies
from launch.sweep_dir import SweepDir
from launch.topologies import Chips
from launch.units import Unit

FLAGS = flags.FlagValues()
_OPTIONS = command.define(FLAGS)
_REMOTE = remote.define(FLAGS, "/sweeps")
_BUCKET = flags.DEFINE_string(
    "bucket", None, "gs:// or s3:// of ROOT, mounted where --remote_root is.", FLAGS
)
_SPOT = flags.DEFINE_bool("spot", True, "Machines that may be taken away.", FLAGS)
_PYTHON = "~/env/bin/python"


def task(sweep: SweepDir, unit: Unit, chips: Chips, repository: str) -> dict[str, Any]:
    """A task of SkyPilot as a mapping of its file's keys."""
    made: dict[str, Any] = {
        "name": remote.name(sweep, unit),
        "workdir": repository,
        "resources": resources(chips) | {"use_spot": _SPOT.value},
        "setup": "\n".join(
            [
                "python3 -m pip install -q --user uv",
                "python3 -m uv venv -q --allow-existing --python 3.12 ~/env",
                f"python3 -m uv pip install -q --python {_PYTHON} -e '{_package(chips)}'",
            ]
        ),
        "run": remote.command(sweep, unit, _REMOTE.root.value, _PYTHON),
    }
    if _BUCKET.value:
        mount = {"source": _BUCKET.value, "mode": "MOUNT_CACHED"}
        made["file_mounts"] = {_REMOTE.root.value: mount}
    return made


def resources(chips: Chips) -> dict[str, Any]:
    """What SkyPilot calls these chips."""
    if chips.kind == topologies.CPU:
        return {"cpus": "8+"}
    if not chips.is_tpu:
        return {"accelerators": f"{chips.kind}:{chips.count}"}
    if chips.kind not in topologies.TPU_IMAGES:
        raise UserError(
            f"--topology: {chips.kind}: SkyPilot has no such chips: give one of "
            f"{', '.join(topologies.TPU_IMAGES)}, H100 or H200"
        )
    count = 2 * chips.count if chips.kind == "v5p" else chips.count
    return {
        "accelerators": f"tpu-{chips.kind}-{count}",
        "accelerator_args": {
            "runtime_version": topologies.TPU_IMAGES[chips.kind],
            "tpu_vm": True,
        },
    }


def _package(chips: Chips) -> str:
    """The checkout as pip names it, with what JAX needs for these chips."""
    if chips.kind == topologies.CPU:
        return "."
    return ".[tpu]" if chips.is_tpu else ".[cuda]"


def main(extra: list[str]) -> None:
    if not _REMOTE.dry_run.value:
        command.program("sky", "pip install 'flowgrpo_jax[sky]', then `sky check`")
    chips = remote.chips(_OPTIONS)
    topologies.one_machine(_OPTIONS.topology.value, chips)
    resources(chips)
    if not _BUCKET.value:
        raise UserError(
            "--bucket: missing: what a machine writes is gone with it: give gs://NAME or "
            "s3://NAME"
        )
    sweep = command.prepared(_OPTIONS, extra)
    folder = sweep.path / "sky"
    folder.mkdir(exist_ok=True)
    repository = str(command.REPOSITORY)
    for unit in remote.unfinished(sweep):
        path = folder / f"{unit.wid}.yaml"
        made = task(sweep, unit, chips, repository)
        path.write_text(yaml.safe_dump(made, sort_keys=False, width=10_000))
        words = ["--yes", "--detach-run", "--name", made["name"], str(path)]
        remote.call(["sky", "jobs", "launch", *words], _REMOTE.dry_run.value)


if __name__ == "__main__":
    command.run(main, FLAGS)
