"""Runs a sweep on Cloud TPU VMs: a queued resource for each unit, by gcloud.

python -m launch.tpu_vm --config=configs/geneval.py:model=sd3.5-medium \\
  --sweep=launch/sweeps/seeds.py --topology=v5e:2x4 --project=P --zone=Z \\
  --bucket=BUCKET --max_parallel=2 --spot

For each unit: create, wait until it is there, copy this checkout, install, start, follow
its log, delete. A VM that is preempted is created again, and its unit goes on from the
bucket, which gcsfuse mounts. --dry_run prints every command. They go to all workers of a
VM, of which there is one: a unit is one process today.
"""

import shlex
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from flowgrpo_jax.errors import UserError
from launch import command, remote, topologies
from launch.sweep_dir import SweepDir
from launch.topologies import Chips
from launch.units import Unit

_MOUNT = "/tmp/bucket"  # of the bucket, on a VM
FLAGS = flags.FlagValues()
_OPTIONS = command.define(FLAGS)
_REMOTE = remote.define(FLAGS, f"{_MOUNT}/runs")
_PROJECT = flags.DEFINE_string("project", None, "Project of Google Cloud.", FLAGS)
_ZONE = flags.DEFINE_string("zone", None, "Zone of the VMs.", FLAGS)
_BUCKET = flags.DEFINE_string("bucket", None, "Name of the bucket of workdirs.", FLAGS)
_SPOT = flags.DEFINE_bool("spot", False, "VMs that may be taken away.", FLAGS)
_PARALLEL = flags.DEFINE_integer("max_parallel", 1, "VMs.", 1, flag_values=FLAGS)
_RETRIES = flags.DEFINE_integer(
    "retries", 20, "New VMs for a unit whose VM was taken.", 0, flag_values=FLAGS
)
_POLL = flags.DEFINE_float("poll", 30.0, "Seconds of a wait.", flag_values=FLAGS)
_PYTHON = "~/env/bin/python"
# What a queued resource is once no VM will come of it, or no longer is.
_GONE = ("SUSPENDED", "SUSPENDING", "FAILED")
_INSTALL = f"""set -e; mkdir -p {_MOUNT} repo; tar -xzf repo.tar.gz -C repo
command -v gcsfuse || (sudo apt-get update -q && sudo apt-get install -y -q gcsfuse)
mountpoint -q {_MOUNT} || gcsfuse --implicit-dirs {{bucket}} {_MOUNT}
python3 -m pip install -q --user uv
python3 -m uv venv -q --allow-existing --python 3.12 ~/env
python3 -m uv pip install -q --python {_PYTHON} -e 'repo[tpu]'"""


class Machine:
    """The VM of one unit."""

    def __init__(self, sweep: SweepDir, unit: Unit, chips: Chips):
        self._unit, self._chips, root = unit, chips, _REMOTE.root.value
        self._name = remote.name(sweep, unit)
        self._run = f"cd repo && {remote.command(sweep, unit, root, _PYTHON)}"
        self._record = f"{root}/{sweep.xid}/{unit.name}/unit.json"

    def run(self, archive: Path) -> None:
        """Create the VM and run the unit on it, again if it is taken; then delete it."""
        for _ in range(_RETRIES.value + 1):
            try:
                self._create()
                self._start(archive)
                self._follow()
                return
            except UserError:  # gcloud's: the VM is gone, or something is wrong
                if self._state() not in _GONE:
                    raise
                print(f"unit {self._unit.name}: its VM was taken", flush=True)
            finally:
                self._queued("delete", "--quiet", "--force")

    def _create(self) -> None:
        self._queued(
            "create",
            f"--node-id={self._name}",
            f"--accelerator-type={self._chips.accelerator_type}",
            f"--runtime-version={topologies.TPU_IMAGES[self._chips.kind]}",
            *(["--spot"] if _SPOT.value else []),
        )
        while (state := self._state()) != "ACTIVE":
            if state in _GONE:
                raise UserError(f"gcloud: {self._name}: {state}")
            time.sleep(_POLL.value)

    def _start(self, archive: Path) -> None:
        where = f"{self._name}:repo.tar.gz"
        gcloud("tpu-vm", "scp", str(archive), where, "--worker=all")
        self._ssh(_INSTALL.format(bucket=shlex.quote(_BUCKET.value or "")))
        run = f"nohup bash -c {shlex.quote(self._run)} > unit.out 2>&1 < /dev/null &"
        self._ssh(run)

    def _follow(self) -> None:
        """Show the log until the unit has ended; a lost connection ends nothing."""
        follow = "tail -n +1 -F unit.out --pid=$(pgrep -o -f launch.unit)"
        while True:
            self._ssh(follow, "0")
            told = self._ssh(f"cat {shlex.quote(self._record)}", "0")
            if _REMOTE.dry_run.value or '"code"' in told:
                return
            time.sleep(_POLL.value)

    def _state(self) -> str:
        told = self._queued("describe", "--format=value(state.state)")
        return "ACTIVE" if _REMOTE.dry_run.value else told.strip()

    def _queued(self, verb: str, *words: str) -> str:
        return gcloud("queued-resources", verb, self._name, *words)

    def _ssh(self, line: str, worker: str = "all") -> str:
        where = self._name, f"--worker={worker}"
        return gcloud("tpu-vm", "ssh", *where, f"--command={line}")


def gcloud(*words: str) -> str:
    """What a command about TPUs prints; UserError if it fails."""
    place = f"--project={_PROJECT.value}", f"--zone={_ZONE.value}"
    return remote.call(
        ["gcloud", "compute", "tpus", *words, *place], _REMOTE.dry_run.value
    )


def main(extra: list[str]) -> None:
    if not _REMOTE.dry_run.value:
        command.program("gcloud", "install the Google Cloud CLI, then `gcloud init`")
    chips = remote.chips(_OPTIONS)
    if chips.kind not in topologies.TPU_IMAGES:
        kinds = ", ".join(topologies.TPU_IMAGES)
        raise UserError(f"--topology: {chips.kind}: must be one of {kinds} on a TPU VM")
    topologies.one_machine(_OPTIONS.topology.value, chips)
    remote.required("gcloud", _PROJECT, _ZONE, _BUCKET)
    sweep = command.prepared(_OPTIONS, extra)
    machines = [Machine(sweep, unit, chips) for unit in remote.unfinished(sweep)]
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "repo.tar.gz"
        listed = "git ls-files -co --exclude-standard -z"
        packed = f"{listed} | tar -czf {shlex.quote(str(archive))} --null -T -"
        remote.call(["bash", "-c", packed], _REMOTE.dry_run.value, command.REPOSITORY)
        with ThreadPoolExecutor(_PARALLEL.value) as pool:
            list(pool.map(lambda one: one.run(archive), machines))


if __name__ == "__main__":
    command.run(main, FLAGS)
