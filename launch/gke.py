"""Runs a sweep on GKE: a JobSet for each unit, by xpk and its Kueue queue.

python -m launch.gke --config=configs/geneval.py:model=sd3.5-medium \\
  --sweep=launch/sweeps/seeds.py --topology=v6e:2x2 --cluster=C --project=P --zone=Z \\
  --image=IMAGE --storage=BUCKET --remote_root=/bucket/runs

IMAGE has this package installed; --storage is one that `xpk storage` knows, mounted where
--remote_root is. A pod that is preempted saves, is started again and goes on from there:
exit codes above 127 start it again, that of wrong input (2) does not. --dry_run prints
every command and renders the manifests, in ROOT/XID/gke. A unit is one process, so one
machine, today.
"""

import re
from pathlib import Path

from absl import flags

from flowgrpo_jax.errors import UserError
from launch import command, remote, topologies
from launch.sweep_dir import SweepDir
from launch.topologies import Chips
from launch.units import Unit

FLAGS = flags.FlagValues()
_OPTIONS = command.define(FLAGS)
_REMOTE = remote.define(FLAGS, "/data/runs")
_CLUSTER = flags.DEFINE_string("cluster", None, "Cluster of GKE.", FLAGS)
_PROJECT = flags.DEFINE_string("project", None, "Project of Google Cloud.", FLAGS)
_ZONE = flags.DEFINE_string("zone", None, "Zone of the cluster.", FLAGS)
_IMAGE = flags.DEFINE_string("image", None, "Container image with the package.", FLAGS)
_STORAGE = flags.DEFINE_string(
    "storage",
    None,
    "Storage of xpk that is mounted in the pods, with the workdirs.",
    FLAGS,
)
_RETRIES = flags.DEFINE_integer(
    "retries", 20, "Starts again of a unit that a signal ended.", 0, flag_values=FLAGS
)
_GRACE = 300  # seconds from a SIGTERM to the end of a pod: a checkpoint's time
# What is named by its torus, or is no TPU.
_DEVICES = {
    "tpu7x": "tpu7x-{sizes}",
    "H100": "h100-80gb-{count}",
    "H200": "h200-141gb-{count}",
}


def device_type(chips: Chips) -> str:
    """What xpk calls these chips; UserError for a CPU."""
    if chips.kind in topologies.TPU_IMAGES:
        return chips.accelerator_type
    if chips.kind not in _DEVICES:
        raise UserError(f"--topology: {chips.kind}: GKE is for chips: give v6e:2x2")
    return _DEVICES[chips.kind].format(count=chips.count, sizes=chips.sizes)


def argv(sweep: SweepDir, unit: Unit, chips: Chips) -> list[str]:
    """The command of xpk that makes the workload of a unit."""
    words = {
        "workload": remote.name(sweep, unit),
        "cluster": _CLUSTER.value,
        "project": _PROJECT.value,
        "zone": _ZONE.value,
        "device-type": device_type(chips),
        "docker-image": _IMAGE.value,
        "storage": _STORAGE.value,
        "max-restarts": _RETRIES.value,
        "termination-grace-period-seconds": _GRACE,
        "command": remote.command(sweep, unit, _REMOTE.root.value),
    }
    given = [f"--{key}={value}" for key, value in words.items() if value is not None]
    return ["xpk", "workload", "create", *given]


def render(made: list[str], path: Path) -> None:
    """Let xpk write the manifest of a workload; UserError if it needs several machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = ["--dry-run", "--skip-validation", f"--output-manifest-file={path}"]
    remote.call([*made, *extra], dry_run=False)
    pods = re.search(r"parallelism: (\d+)", path.read_text())
    if pods and int(pods[1]) > 1:
        raise UserError(
            f"--topology: {_OPTIONS.topology.value}: is {pods[1]} machines on GKE, and a "
            "unit is one process today: give fewer chips, such as v6e:2x2"
        )


def main(extra: list[str]) -> None:
    command.program("xpk", "pip install 'flowgrpo_jax[gke]'")
    chips = remote.chips(_OPTIONS)
    device_type(chips)
    remote.required("xpk", _CLUSTER, _PROJECT, _ZONE, _IMAGE)
    sweep = command.prepared(_OPTIONS, extra)
    todo = remote.unfinished(sweep)
    for unit in todo:
        path = sweep.path / "gke" / f"{unit.wid}.yaml"
        made = argv(sweep, unit, chips)
        if unit is todo[0] or _REMOTE.dry_run.value:  # they differ in their flags alone
            render(made, path)
        if not _REMOTE.dry_run.value:
            remote.call(made, dry_run=False)


if __name__ == "__main__":
    command.run(main, FLAGS)
