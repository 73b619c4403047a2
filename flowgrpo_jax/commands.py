"""What the commands share: flags to values, one line for wrong input, exit codes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_dict, config_flags

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import platform

STOPPED = 143  # asked to stop by a signal, to be started again


def run(main: Callable[[list[str]], int | None]) -> None:
    """absl's app.run, with wrong input as one line on stderr and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        argv = flags.FLAGS(_readable(sys.argv))
    except (UserError, flags.Error, AttributeError, TypeError, ValueError) as error:
        _fail(error)
    except (FileNotFoundError, IsADirectoryError) as error:
        _fail(f"config: {error.filename}: no such file")
    platform.configure()
    try:
        sys.exit(main(argv))
    except UserError as error:
        _fail(error)


def _readable(argv: list[str]) -> list[str]:
    return argv


def _fail(error: object) -> None:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def required_config(flag: flags.FlagHolder) -> config_dict.ConfigDict:
    """The config of --config; UserError if it was not given."""
    if flag.value is None:
        raise UserError("--config: missing: give a file, such as configs/geneval.py")
    return flag.value


def workdir(given: str | None, flag: flags.FlagHolder) -> Path:
    """--workdir, or runs/<name of the config file>."""
    if given:
        return Path(given)
    path = config_flags.get_config_filename(flags.FLAGS[flag.name])
    return Path("runs") / Path(path.split(":")[0]).stem
