"""What the commands share: flags to values, one line for wrong input, exit codes."""

import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from flowgrpo_jax.config import overrides
from flowgrpo_jax.errors import UserError, shown_above
from flowgrpo_jax.runtime import disk, platform, stopping
from flowgrpo_jax.runtime.workdir import locate

WRONG_INPUT = 2
_INTERRUPTED = 130
_UNREAD = 141  # as a program that SIGPIPE ends
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
    main: Callable[[], int | None], values: flags.FlagValues, computes: bool = True
) -> NoReturn:
    """Parse sys.argv into `values`, call `main`, exit; wrong input is one line.

    Every command has flags of its own: absl's global ones would mix them where two
    commands are imported. One that `computes` sets up the devices of this machine, in
    variables that processes inherit: a launcher does not.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.ERROR)  # warnings of libraries about themselves
    sys.unraisablehook = _unraisable
    status = 1
    try:
        status = _status(main, values, computes)
    except Exception:  # a fault of this package
        with _unread():
            traceback.print_exc()
    stopping.finish(status)


def _status(
    main: Callable[[], int | None], values: flags.FlagValues, computes: bool
) -> int:
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(sys.modules[main.__module__].__doc__, values.get_help(), sep="\n")
            return 0
        parse(values)
        if computes:
            platform.configure()
        return main() or 0
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = None
        return _UNREAD
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_FULL:
            raise
        return _fail(disk.line(error))
    except KeyboardInterrupt:
        return _INTERRUPTED


def parse(values: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """Fill `values` from sys.argv or `argv`; UserError for anything that is wrong there."""
    argv = values.read_flags_from_files(argv or sys.argv, force_gnu=False)
    argv = overrides.at_home(argv)
    argv = overrides.from_package(argv)
    overrides.check(argv)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise overrides.unknown_flag(error, list(values)) from error
    except flags.Error as error:
        raise overrides.wrong_value(str(error)) from error
    if rest:
        raise UserError(f"{rest[0]}: not a flag: values are given as --name=value")
    from flowgrpo_jax.config.values import (
        check_flag,  # the networks' modules are slow to load
    )

    for name in values:
        if values[name].present:
            check_flag(name, values[name].value)


def _unraisable(event: "sys.UnraisableHookArgs") -> None:
    """After a failed save orbax leaves coroutines to a closed loop: no news."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _fail(error: object) -> int:
    with _unread():
        if above := shown_above(error if isinstance(error, UserError) else None):
            print(above, file=sys.stderr)
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
    # Coroutines that orbax leaves behind are no news either.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    return WRONG_INPUT


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """Within it stderr may be gone: whoever read it has ended before this process."""
    try:
        yield
    except (OSError, ValueError, AttributeError):  # a broken pipe, a closed file, None
        sys.stderr = None


def required_config(flag: flags.FlagHolder) -> ConfigDict:
    """The config of --config; UserError if it was not given."""
    if flag.value is None:
        raise UserError("--config: missing: give a file, such as configs/geneval.py")
    return flag.value


def workdir(given: str | None, config_flag: flags.Flag) -> Path:
    """--workdir, or runs/<name of the config file>; absolute, and a name that works."""
    path = config_flags.get_config_filename(config_flag)
    return locate(given or Path("runs") / Path(path.split(":")[0]).stem)


def writable_folder(path: Path, flag: str) -> Path:
    """Create a folder for results; UserError naming the flag if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "cannot be written to"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    if reason:
        raise UserError(f"{flag}: {path}: {reason}: give another one")
    return path
