"""The folder of one run: its config, its lock, and files that are whole or absent.

    config.json    what the run was started with
    metrics.jsonl  tensorboard/  checkpoints/  samples/  report.html

The same command with the same `--workdir` goes on where the run stopped; a workdir
of another config is refused before anything in it is touched.
"""

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, Any

from flowgrpo_jax.errors import UserError

_CONFIG = "config.json"
_LOCK = ".lock"
_ABSENT = object()


class Workdir:
    """An open workdir; no other process can open it until `close`."""

    def __init__(self, path: Path, lock: IO[str] | None, resumed: bool):
        self.path = path
        self.resumed = resumed
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._lock = lock

    def close(self) -> None:
        """Lets another process open the workdir."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_workdir(
    path: str | Path,
    config: Mapping[str, Any],
    may_differ: AbstractSet[str] = frozenset(),
) -> Workdir:
    """Creates the workdir of `config`, or opens the one that already holds it.

    Args:
      path: the folder; parents are created.
      config: nested mappings of JSON values; tuples count as lists.
      may_differ: globs over dotted keys (`num_iterations`, `eval.*`, `mesh`) whose
        values a resumed run may change; a glob also covers all keys below it.
    """
    path = Path(path)
    wanted = json.loads(json.dumps(config))
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        resumed = _check_config(path, wanted, may_differ)
        atomic_write(path / _CONFIG, json.dumps(wanted, indent=2) + "\n")
        with user_errors(path):
            (path / "samples").mkdir(exist_ok=True)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return Workdir(path, lock, resumed)


def read_config(path: str | Path) -> dict[str, Any]:
    """The config that a workdir holds."""
    file = Path(path) / _CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"workdir: {path}: holds no {_CONFIG}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"workdir: {file}: cannot be read ({error}): "
            "take another --workdir, or delete this one"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"workdir: {file}: holds no config: take another --workdir")
    return config


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replaces a file in one step: after a crash it is the old one or the new one."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with user_errors(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 is for secrets
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def user_errors(path: str | Path) -> Iterator[None]:
    """Turns what the file system refuses at `path` into one line for the user."""
    try:
        yield
    except OSError as error:
        remedy = "take another --workdir, or make this one writable"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "what was there is intact; free some space and start again"
        raise UserError(
            f"workdir: {path}: {(error.strerror or str(error)).lower()}: {remedy}"
        ) from error


def _lock(path: Path) -> IO[str] | None:
    """Holds `path/.lock`; the kernel frees it when the process ends in any way."""
    file = (path / _LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"workdir: {path}: in use by process {holder}: "
            "stop that process, or take another --workdir"
        ) from error
    except OSError:  # a file system without locks: the user has to take care
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _check_config(
    path: Path, wanted: dict[str, Any], may_differ: AbstractSet[str]
) -> bool:
    """Whether a run of this config is there; raises if it is one of another."""
    if not (path / _CONFIG).exists():
        if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
            raise UserError(
                f"workdir: {path}: holds a run but no {_CONFIG}: "
                "take another --workdir, or delete this one"
            )
        return False
    held, new = _flat(read_config(path)), _flat(wanted)
    for key in [*new, *(key for key in held if key not in new)]:
        old_value, value = held.get(key, _ABSENT), new.get(key, _ABSENT)
        if _same(old_value, value) or _allowed(key, may_differ):
            continue
        raise UserError(
            f"{key}: {_show(value)}: workdir {path} holds a run with "
            f"{_show(old_value)}: take another --workdir, or delete this one"
        )
    return True


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaf values; an empty mapping is a leaf too."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _same(old: Any, new: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not, NaN is itself."""
    return json.dumps(old, default=str) == json.dumps(new, default=str) or (
        old == new and not isinstance(old, bool) and not isinstance(new, bool)
    )


def _allowed(key: str, may_differ: AbstractSet[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(key, glob) or fnmatch.fnmatchcase(key, f"{glob}.*")
        for glob in may_differ
    )


def _show(value: Any) -> str:
    return "no such key" if value is _ABSENT else json.dumps(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
