"""Paths as users write them."""

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder, as shells do not after a `=`.

    Where there is no such home, `~name` is a name like any other.
    """
    return Path(os.path.expanduser(path))
