"""What the back ends share: their flags, the sweep that these describe, the end."""

import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from absl import flags

from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError
from launch import sweep_dir, units
from launch.sweep_dir import SweepDir

REPOSITORY = Path(__file__).parents[1]  # of this package, for machines that lack it
Main = Callable[[list[str]], int | None]


@dataclass(frozen=True)
class Options:
    """The flags of every back end, as absl keeps them."""

    values: flags.FlagValues
    config: flags.FlagHolder
    sweep: flags.FlagHolder
    root: flags.FlagHolder
    xid: flags.FlagHolder
    topology: flags.FlagHolder
    anyway: flags.FlagHolder


def define(values: flags.FlagValues) -> Options:
    """Define the flags of every back end in `values`."""

    def text(name: str, default: str | None, told: str) -> flags.FlagHolder:
        return flags.DEFINE_string(name, default, told, values)

    return Options(
        values,
        text("config", None, "Config of every unit: FILE.py or FILE.py:recipe=NAME."),
        text(
            "sweep",
            None,
            "FILE.py with sweep(hyper), or FILE.py:FUNCTION; by default the sweep beside "
            "the config's get_config. Ready ones are in launch/sweeps/.",
        ),
        text("root", "runs", "Folder of sweeps: units write ROOT/XID/WID-values."),
        text("xid", None, "Name of the sweep; by default its number, or the next one."),
        text(
            "topology",
            None,
            "Chips of one unit, as `estimate` names them: v5e:2x4, h100:8; or cpu. A "
            "unit that does not fit is refused.",
        ),
        flags.DEFINE_bool(
            "anyway", False, "Launch units that do not fit all the same.", values
        ),
    )


def run(main: Main, values: flags.FlagValues, named: bool = False) -> NoReturn:
    """Call `main` with the words behind ` -- `, or those that are no flags, and exit.

    Wrong input is one line and exit code 2, as with every command of the package.
    """
    try:
        sys.argv, rest = names(sys.argv) if named else split(sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(cli.WRONG_INPUT)

    @functools.wraps(main)
    def with_rest() -> int | None:
        return main(rest)

    # Units find the devices that they are given, not those of this process.
    cli.run(with_rest, values, computes=False)


def one_line(call: Callable[[], int | None]) -> int:
    """What `call` returns; wrong input is one line and 2. For programs that parse flags."""
    try:
        return call() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.WRONG_INPUT


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's own words, those of all units): the latter stand behind ` -- `."""
    own = list(argv)
    rest: list[str] = []
    if "--" in own:
        place = own.index("--")
        own, rest = own[:place], own[place + 1 :]
    for word in own[1:]:
        if word.startswith(("--config.", "--noconfig.")):
            raise UserError(f"{word}: is a flag of the units: put it behind ` -- `")
    return own, rest


def names(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the flags, the words that are none), for a command that is given names."""
    own = [word for word in argv[1:] if word.startswith("-")]
    return [argv[0], *own], [word for word in argv[1:] if word not in own]


def prepared(options: Options, extra: Sequence[str]) -> SweepDir:
    """The sweep of these flags: every unit checked, ROOT/XID there; UserError if not."""
    from launch import checks, topologies

    if options.config.value is None:
        raise UserError("--config: missing: give a file, such as configs/geneval.py")
    points = units.load(options.sweep.value, options.config.value)
    made = units.make(options.config.value, points, extra)
    configs = checks.check(made)
    topology = options.topology.value
    if topology is not None and not options.anyway.value:
        chips = topologies.parse(topology)
        if chips.estimated:
            for wid, line in checks.refused(configs, chips.estimated):
                raise UserError(
                    f"unit {wid}: on {topology} it {line}; --anyway launches it"
                )
    command = shlex.join([os.path.basename(sys.executable), *sys.argv, "--", *extra])
    sweep = sweep_dir.open_sweep(options.root.value, options.xid.value, made, command)
    print(f"{len(made)} units in {sweep.path}", flush=True)
    return sweep


def program(name: str, remedy: str) -> str:
    """Where a program is; UserError that tells the remedy if it is not installed."""
    if (path := shutil.which(name)) is None:
        raise UserError(f"{name}: is not installed here: {remedy}")
    return path
