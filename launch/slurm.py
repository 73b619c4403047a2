"""Runs a sweep on a SLURM cluster: one array of jobs, by submitit.

python -m launch.slurm --config=configs/geneval.py --sweep=launch/sweeps/seeds.py \\
  --root=/shared/runs --topology=h100:8 --partition=gpu --minutes=480

It submits and ends; `squeue` shows the jobs and `python -m launch.table ROOT/XID` how far
they are, --wait stays and shows both. ROOT is on a file system that all nodes see. A job
whose time is up or that is preempted saves, is queued again and goes on.

--topology=h100:16 --nodes=2: a unit is two tasks, each on a node with eight GPUs.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from flowgrpo_jax.errors import UserError
from launch import command, states, table, topologies, unit
from launch.live import Live

FLAGS = flags.FlagValues()
_OPTIONS = command.define(FLAGS)
_PARTITION = flags.DEFINE_string("partition", None, "SLURM's partition.", FLAGS)
_ACCOUNT = flags.DEFINE_string("account", None, "Account that pays.", FLAGS)
_MINUTES = flags.DEFINE_integer(
    "minutes", 60, "Time of a job; then it is queued again.", 1, flag_values=FLAGS
)
_PARALLEL = flags.DEFINE_integer(
    "max_parallel", 64, "Jobs of the array at once.", 1, flag_values=FLAGS
)
_NODES = flags.DEFINE_integer("nodes", 1, "Nodes of a unit.", 1, flag_values=FLAGS)
_CPUS = flags.DEFINE_integer("cpus", 8, "CPU cores of a node.", 1, flag_values=FLAGS)
_MEMORY = flags.DEFINE_integer(
    "memory_gb", None, "Memory of a node; by default the cluster's.", flag_values=FLAGS
)
_WAIT = flags.DEFINE_bool("wait", False, "Stay until all units have ended.", FLAGS)
_CLUSTER = flags.DEFINE_enum(
    "cluster",
    "slurm",
    ["slurm", "local"],
    "local: the same code as processes of this machine, all at once, without SLURM.",
    flag_values=FLAGS,
)
_TURN = 1.0  # seconds between two looks at the jobs
_MOST_STARTS = 1000  # of a unit, whose time was up before


class Task:
    """What a job calls. Asked to make room, submitit queues it again with `checkpoint`."""

    def __init__(self, words: list[str]):
        self.words = words

    def __call__(self) -> int:
        # A signal to a step reaches the run itself, so none is passed on twice.
        code = unit.run(self.words, shared=True)
        if code in unit.SAVED:  # no result: the job may be queued again
            sys.exit(code)
        if code:
            raise RuntimeError(f"exit code {code}: see {unit.LOG} in the workdir")
        return code

    def checkpoint(self, *_: Any) -> Any:
        """The same again: `main` goes on from the checkpoint that it saves now."""
        import submitit

        unit.stop()
        return submitit.helpers.DelayedSubmission(Task(self.words))


def executor(folder: Path) -> Any:
    """submitit's, with the options of the command line; UserError without SLURM."""
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "launch.slurm: needs submitit: pip install 'flowgrpo_jax[slurm]'"
        ) from error
    if _CLUSTER.value == "local" and _NODES.value > 1:
        raise UserError(f"--nodes: {_NODES.value}: must be 1 with --cluster=local")
    if _CLUSTER.value == "slurm":
        command.program("sbatch", "start it on a login node of the cluster")
    made = submitit.AutoExecutor(
        folder=folder, cluster=_CLUSTER.value, slurm_max_num_timeout=_MOST_STARTS
    )
    made.update_parameters(
        name=f"sweep{folder.parent.name}",
        timeout_min=_MINUTES.value,
        nodes=_NODES.value,
        tasks_per_node=1,
        cpus_per_task=_CPUS.value,
        gpus_per_node=_gpus(),
        slurm_array_parallelism=_PARALLEL.value,
        slurm_partition=_PARTITION.value,
        slurm_account=_ACCOUNT.value,
        slurm_mem=f"{_MEMORY.value}GB" if _MEMORY.value else None,
        slurm_signal_delay_s=120,
    )
    return made


def _gpus() -> int:
    """How many GPUs of --topology a node gives."""
    if (name := _OPTIONS.topology.value) is None:
        return 0
    chips = topologies.parse(name)
    if chips.is_tpu:
        raise UserError(f"--topology: {name}: SLURM has GPUs: give h100:8, or cpu")
    if chips.count % _NODES.value:
        raise UserError(f"--nodes: {_NODES.value}: must divide the chips of {name}")
    return chips.count // _NODES.value


def main(extra: list[str]) -> int:
    made = executor(Path())  # before anything is checked for minutes
    sweep = command.prepared(_OPTIONS, extra)
    made = executor(sweep.path / "submitit")
    todo = [one.unit for one in states.of(sweep) if not one.is_done]
    with made.batch():
        jobs = [made.submit(Task(sweep.words(one))) for one in todo]
    for one, job in zip(todo, jobs, strict=True):
        print(f"unit {one.name}: job {job.job_id}")
    print(f"how far they are: python -m launch.table {sweep.path}", flush=True)
    if not _WAIT.value:
        return 0
    live = Live(sweep)
    while _are_queued(jobs):
        live.show()
        time.sleep(_TURN)
    live.show(at_once=True)
    return int(table.tell(sweep))


def _are_queued(jobs: list[Any]) -> bool:
    """Whether a job runs or is to run; asked of `squeue`, since `sacct` may have no data."""
    if _CLUSTER.value == "local":
        return any(job.state == "RUNNING" for job in jobs)
    numbers = ",".join({job.job_id.partition("_")[0] for job in jobs})
    listed = subprocess.run(
        ["squeue", "--noheader", "--jobs", numbers], capture_output=True, text=True
    )
    return bool(jobs) and bool(listed.stdout.strip())


if __name__ == "__main__":
    command.run(main, FLAGS)
