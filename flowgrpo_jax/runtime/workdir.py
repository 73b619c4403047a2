"""The folder of one run: its config, its lock, and files that are whole or absent.

    config.json    the config that the run was started with
    prompts.json   digests of the prompts that it was started with
    environment.json    the environments that it ran in (`environment`)
    metrics.jsonl  tensorboard/  checkpoints/  samples/  report.html

The same command with the same `--workdir` goes on where the run stopped. A workdir with
another config or other prompts is refused before anything in it is changed. So is one
whose rows would be lost: that of a longer run, or one without its checkpoints.
"""

import contextlib
import errno
import fcntl
import fnmatch
import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, Any

from flowgrpo_jax.errors import UserError, shown
from flowgrpo_jax.runtime import disk, paths

_CONFIG = "config.json"
_PROMPTS = "prompts.json"
_METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
_LONGEST = 3800  # bytes; checkpoints have longer names below it, and Linux takes 4,095
_LOCK = ".lock"
_ABSENT = object()


class Workdir:
    """An open workdir; no other process can open it before `close`."""

    def __init__(self, path: Path, lock: IO[str] | None, resumed: bool):
        self.path = path
        self.resumed = resumed
        self.metrics = path / _METRICS
        self.checkpoints = path / _CHECKPOINTS
        self.samples = path / "samples"
        self._lock = lock

    def close(self) -> None:
        """Releases the lock, so that another process can open the workdir."""
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
    digests: Mapping[str, str] | None = None,
) -> Workdir:
    """Creates the workdir of `config`, or opens the one that already holds it.

    Args:
      path: the folder (see `locate`); parents are created.
      config: nested mappings of JSON values; tuples count as lists.
      may_differ: globs over dotted keys (`num_iterations`, `eval.*`, `mesh`) whose
        values a resumed run may change; a glob also covers all keys below it.
      digests: key of the config -> digest of the prompts that it names; a resumed run
        must have the same digests.
    """
    path = locate(path)
    wanted = json.loads(json.dumps(config))
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        resumed = _check_config(path, wanted, may_differ)
        if resumed:
            _check_recorded(path, wanted)
            check_digests(path, digests or {})
        atomic_write(path / _CONFIG, json.dumps(wanted, indent=2) + "\n")
        if digests:
            atomic_write(path / _PROMPTS, json.dumps(digests, indent=2) + "\n")
        with user_errors(path):
            (path / "samples").mkdir(exist_ok=True)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return Workdir(path, lock, resumed)


def locate(path: str | Path) -> Path:
    """The absolute path of a workdir, with `~` replaced by the home folder.

    UserError for a path that is not UTF-8 text, or that is so long that the files of a
    checkpoint in it could not be named.
    """
    place = paths.local(path).absolute()
    try:
        length = len(str(place).encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"workdir: {shown(str(path))}: must be named in UTF-8: take another "
            "--workdir"
        ) from error
    if length > _LONGEST or "\0" in str(place):
        raise UserError(
            f"workdir: {str(path)[:100]}...: must have a path of at most {_LONGEST:,} "
            "bytes, none of them 0: take another --workdir"
        )
    return place


def read_config(path: str | Path) -> dict[str, Any]:
    """The config in a workdir; UserError if there is none or it cannot be read."""
    file = paths.local(path) / _CONFIG
    try:
        config = parse_json(file.read_text())
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


def parse_json(text: str | bytes) -> Any:
    """json.loads, but with ValueError for all that it cannot read, deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def checkpoint_steps(path: Path) -> list[int]:
    """The steps of a workdir's checkpoints (numbers of finished iterations), in order.

    An empty folder is not a checkpoint, whatever its name.
    """
    folder = path / _CHECKPOINTS
    names = os.listdir(folder) if folder.is_dir() else []
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    filled = [name for name in numbers if any((folder / name).iterdir())]
    return sorted(map(int, filled))


def finished_line(path: Path, num_iterations: int) -> str:
    """A line for a run with nothing left to do but its last evaluation, or else ""."""
    if num_iterations not in checkpoint_steps(path):
        return ""
    return (
        f"finished: all {num_iterations} iterations were done before: it is evaluated "
        "once more and its result written again; a larger num_iterations goes on"
    )


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replaces a file in one step: a crash leaves the old file or the new one."""
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
    """Turns errors of the file system at `path` into one line for the user."""
    try:
        yield
    except OSError as error:
        remedy = disk.remedy(error.errno)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"what was there is intact; {remedy} and start again"
        else:
            remedy = f"take another --workdir, or {remedy}"
        raise UserError(
            f"workdir: {path}: {(error.strerror or str(error)).lower()}: {remedy}"
        ) from error


def _lock(path: Path) -> IO[str] | None:
    """Locks `path/.lock`; the kernel unlocks it however the process ends."""
    file = (path / _LOCK).open("a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise UserError(
            f"workdir: {path}: in use by process {holder}: "
            "stop that process, or take another --workdir"
        ) from error
    except OSError:  # a file system without locks: nothing protects the workdir
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    close_in_children(file)
    return file


def close_in_children(file: IO) -> None:
    """Closes the file in forked processes, such as workers of a reward.

    One that outlives the run would otherwise keep the workdir locked.
    """
    _locks.add(file)


_locks: weakref.WeakSet[IO] = weakref.WeakSet()


def _close_locks() -> None:
    for file in list(_locks):
        file.close()


os.register_at_fork(after_in_child=_close_locks)


def _check_config(
    path: Path, wanted: dict[str, Any], may_differ: AbstractSet[str]
) -> bool:
    """Whether a run of this config is there; UserError if a run of another one is."""
    if not (path / _CONFIG).exists():
        if (path / _METRICS).exists() or (path / _CHECKPOINTS).exists():
            raise UserError(
                f"workdir: {path}: holds a run but no {_CONFIG}: "
                "take another --workdir, or delete this one"
            )
        return False
    old, new = flat(read_config(path)), flat(wanted)
    for key in [*new, *(key for key in old if key not in new)]:
        old_value, value = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if _same(old_value, value) or _allowed(key, may_differ):
            continue
        raise UserError(
            f"{key}: {_show(value)}: workdir {path} holds a run with "
            f"{_show(old_value)}: take another --workdir, or delete this one"
        )
    return True


def _check_recorded(path: Path, wanted: Mapping[str, Any]) -> None:
    """UserError if going on would remove rows that nothing would write again."""
    steps, last = checkpoint_steps(path), wanted.get("num_iterations")
    if steps and isinstance(last, int) and last < steps[-1]:
        raise UserError(
            f"num_iterations: {last}: workdir {path} has done {steps[-1]} iterations "
            f"already: give {steps[-1]} or more, or take another --workdir"
        )
    # The second checkpoint is begun when the first is on disk. So a process that was
    # killed without any checkpoint has no row from iteration `unsaved` on.
    group = read_config(path).get("checkpoint")
    every = group.get("every") if isinstance(group, Mapping) else None
    unsaved = 2 * every if isinstance(every, int) else math.inf
    rows = _iterations(path / _METRICS)
    gone = not (path / _CHECKPOINTS).is_dir()
    if rows and (gone or not steps and rows[-1] >= unsaved):
        raise UserError(
            f"workdir: {path}: {_METRICS} has rows up to iteration {rows[-1]}, and of "
            f"its {_CHECKPOINTS} there is none: put them back, or delete {_METRICS} "
            "too to begin again"
        )


def _iterations(path: Path) -> list[int]:
    """The iterations of all readable rows; `metrics` reports the others."""
    iterations = []
    with user_errors(path):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            iteration = parse_json(line)["iteration"]
            iterations += [iteration] if type(iteration) is int else []
    return iterations


def check_digests(path: Path, digests: Mapping[str, str]) -> None:
    """UserError if the run in a workdir began with other prompts than these."""
    file = path / _PROMPTS
    if not file.exists():  # written by a version without this file
        return
    try:
        recorded = parse_json(file.read_text())
        changed = [key for key in digests if recorded[key] != digests[key]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"workdir: {file}: cannot be read ({error}): delete it if the prompts are "
            "those that the run began with"
        ) from error
    if changed:
        raise UserError(
            f"{changed[0]}: its prompts are not those that the run in {path} began with: "
            "put them back, or take another --workdir"
        )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaf values by dotted key; an empty mapping is a leaf too."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal in JSON: 1 and 1.0, NaN and NaN; not 1 and true."""
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
