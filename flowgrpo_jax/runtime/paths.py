"""Paths as people write them."""

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """A path whose `~` is the home folder: the shell leaves it where it follows a `=`.

    Where there is no such home, `~name` is a name like others.
    """
    return Path(os.path.expanduser(path))
