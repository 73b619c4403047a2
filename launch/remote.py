"""What the back ends on other machines share: where units write there, and dry runs."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from flowgrpo_jax.errors import UserError
from launch import states, topologies
from launch.command import Options
from launch.sweep_dir import SweepDir
from launch.topologies import Chips
from launch.units import Unit


@dataclass(frozen=True)
class RemoteOptions:
    """The flags of back ends on other machines, as absl keeps them."""

    root: flags.FlagHolder
    dry_run: flags.FlagHolder


def define(values: flags.FlagValues, root: str) -> RemoteOptions:
    """Define them in `values`; `root` is where units write there by default."""
    return RemoteOptions(
        flags.DEFINE_string(
            "remote_root", root, "What ROOT is called where the units run.", values
        ),
        flags.DEFINE_bool(
            "dry_run", False, "Print every command, and run none of them.", values
        ),
    )


def chips(options: Options) -> Chips:
    """The chips of --topology, which a rented machine cannot do without."""
    if options.topology.value is None:
        raise UserError(
            "--topology: missing: give the chips of a unit, such as v6e:2x2"
        )
    return topologies.parse(options.topology.value)


def required(program: str, *holders: flags.FlagHolder) -> None:
    """UserError for the first of these flags that has no value."""
    for holder in holders:
        if not holder.value:
            raise UserError(f"--{holder.name}: missing: {program} needs it")


def unfinished(sweep: SweepDir) -> list[Unit]:
    """Units that are not finished, as far as their workdirs are here to tell.

    UserError for a config that only this machine has.
    """
    for unit in sweep.units:
        source = unit.words[0].removeprefix("--config=")
        if Path(source.partition(":")[0]).is_absolute():
            raise UserError(
                f"unit {unit.wid}: --config: {source}: is a path of this machine: give "
                "one inside the checkout, such as configs/geneval.py"
            )
    return [one.unit for one in states.of(sweep) if not one.is_done]


def command(sweep: SweepDir, unit: Unit, root: str, python: str = "python") -> str:
    """One command of a shell that runs a unit there; `exec`, so that signals reach it.

    `python` is a word of that shell: it may begin with `~`.
    """
    return f"exec {python} -m launch.unit {shlex.join(sweep.words(unit, root))}"


def name(sweep: SweepDir, unit: Unit, longest: int = 40) -> str:
    """A name for a job: lower-case letters, digits and hyphens, a letter first."""
    xid = re.sub("[^a-z0-9]+", "-", sweep.xid.lower()).strip("-")
    end = f"-{unit.wid}"
    return f"sweep-{xid}"[: longest - len(end)].rstrip("-") + end


def call(argv: Sequence[str], dry_run: bool, folder: Path | None = None) -> str:
    """Print a command as a shell reads it; unless dry, run it and show what it prints.

    Returns what it printed; UserError with its last line if it fails.
    """
    print(f"+ {shlex.join(argv)}", flush=True)
    if dry_run:
        return ""
    lines = []
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        last = lines[-1].strip() if lines else "it says nothing"
        raise UserError(f"{argv[0]}: exit code {process.returncode}: {last}")
    return "".join(lines)
