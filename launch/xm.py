"""Runs a sweep as an experiment of XManager, on this machine.

xmanager launch launch/xm.py -- --config=configs/geneval.py \\
  --sweep=launch/sweeps/seeds.py --max_parallel=2 -- --config.num_iterations=100

Or: python -m launch.xm with the same flags. docs/launch.md says what the public XManager
cannot do; what it needs is the extra `xm`.
"""

import asyncio
import contextlib
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from absl import app, flags

try:  # at once: it has a flag that `xmanager launch` sets
    from xmanager import xm, xm_local
except ImportError:
    xm = None

from flowgrpo_jax.errors import UserError
from launch import command, slots, states, table
from launch.sweep_dir import SweepDir
from launch.units import Unit

_OPTIONS = command.define(flags.FLAGS)
_PLATFORM = flags.DEFINE_enum(
    "platform",
    "local",
    ["local"],
    "Where XManager runs the units. Outside Google it runs them on this machine: for TPU "
    "VMs, GKE and SLURM take launch.tpu_vm, launch.gke and launch.slurm.",
)
_PARALLEL = flags.DEFINE_integer(
    "max_parallel", 1, "Units at once; by itself XManager starts all of them.", 1
)
_SERVER = flags.DEFINE_string(
    "reward_server",
    None,
    "Flags of flowgrpo_jax.rewards.server, which then runs beside the units: "
    "'--rewards=ocr --port=18085'. Their reward_options name it.",
)
SERVER = ("flowgrpo_jax.rewards.server",)
_DATABASE = Path("~/.xmanager/experiments.sqlite3")


async def _run(sweep: SweepDir, todo: list[Unit], devices: list[slots.Slot]) -> None:
    """Add all units, each when a slot is free, and wait for the last one."""
    free: asyncio.Queue[slots.Slot] = asyncio.Queue()
    for slot in devices:
        free.put_nowait(slot)
    async with xm_local.create_experiment(f"sweep {sweep.xid}") as experiment:
        executable = _module(experiment, "launch.unit")
        print(
            f"XManager's experiment {experiment.experiment_id}; its data base is "
            f"{_DATABASE}, every unit's log is in its workdir",
            flush=True,
        )

        async def run(unit: Unit) -> None:
            slot = await free.get()
            job = xm.Job(
                executable,
                xm_local.Local(),
                args=sweep.words(unit),
                env_vars=slot.variables,
                name=f"unit_{unit.wid}",
            )
            try:
                added = await experiment.add(job)
                await added.wait_until_complete()
            except xm.ExperimentUnitFailedError:
                pass  # the others go on; the table says what became of it
            finally:
                free.put_nowait(slot)

        async with _reward_server(experiment):
            await asyncio.gather(*map(run, todo))


def _module(experiment: Any, name: str) -> Any:
    spec = xm_local.Local.Spec()
    packaged = experiment.package([xm.binary(spec, sys.executable, args=["-m", name])])
    return packaged[0]


@contextlib.asynccontextmanager
async def _reward_server(experiment: Any) -> AsyncIterator[None]:
    """The server of --reward_server as an auxiliary unit; it ends with this context."""
    if _SERVER.value is None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        ended = Path(folder) / "ended"
        command = [sys.executable, "-m", *SERVER, *shlex.split(_SERVER.value)]
        job = xm.Job(
            _module(experiment, "launch.beside"),
            xm_local.Local(),
            args=[str(ended), *command],
            name="reward_server",
        )
        added = await experiment.add(xm.AuxiliaryUnitJob(job, termination_delay_secs=0))
        try:
            yield
        finally:
            ended.touch()
            # Should the server have failed, it has said why, and XManager tells it below.
            with contextlib.suppress(xm.ExperimentUnitFailedError):
                await added.wait_until_complete()


def main(argv: list[str]) -> int:
    """What `xmanager launch` calls, with the words that are no flags."""
    return command.one_line(lambda: _launch(argv[1:]))


def _launch(extra: list[str]) -> int:
    if xm is None:
        raise UserError(
            "launch.xm: needs XManager: uv pip install 'flowgrpo_jax[xm]' (pip alone "
            "takes a quarter of an hour to choose versions)"
        )
    devices = slots.of_this_machine(_PARALLEL.value)
    sweep = command.prepared(_OPTIONS, extra)
    todo = [one.unit for one in states.of(sweep) if not one.is_done]
    try:
        asyncio.run(_run(sweep, todo, devices))
    except RuntimeError as error:  # XManager's, of a unit that failed, on leaving
        print(f"XManager: {error}", file=sys.stderr)
    return int(table.tell(sweep))


if __name__ == "__main__":
    app.run(main)
