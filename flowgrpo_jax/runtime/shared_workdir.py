"""A workdir that several processes have in common: the first one opens and writes it."""

import contextlib
import time
import uuid
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import cluster
from flowgrpo_jax.runtime.workdir import Workdir, locate, open_workdir, user_errors

_SEEN = 10.0  # seconds within which a network's file system shows a new file


def open_on_all(
    path: str | Path,
    config: Mapping[str, Any],
    may_differ: AbstractSet[str] = frozenset(),
    digests: Mapping[str, str] | None = None,
) -> Workdir:
    """As `open_workdir`; UserError, with nothing written, if hosts see other folders."""
    if cluster.count() == 1:
        return open_workdir(path, config, may_differ, digests)
    place = locate(path)
    _check_is_shared(place)
    opened: Workdir | None = None

    def open_it() -> None:
        nonlocal opened
        opened = open_workdir(path, config, may_differ, digests)

    cluster.first(open_it)
    return opened or Workdir(place, None, resumed=False)


def _check_is_shared(place: Path) -> None:
    """UserError for a process that does not see what the first one writes."""
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    sign = place / f".shared.{uuid.uuid4().hex}"

    def write() -> str:
        with user_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            sign.touch()
        return sign.name

    try:
        name = cluster.first(write)
        cluster.together(lambda: _look_for(place / name))
    except UserError:
        if cluster.is_first():
            with contextlib.suppress(OSError):
                sign.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        raise
    if cluster.is_first():
        sign.unlink(missing_ok=True)


def _look_for(file: Path) -> None:
    until = time.monotonic() + _SEEN
    while not file.exists():
        if time.monotonic() > until:
            raise UserError(
                f"workdir: {file.parent}: is not what process 0 writes to: must lie on a "
                "file system that all hosts share"
            )
        time.sleep(0.1)
