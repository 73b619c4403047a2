"""Checkpoints: any pytree of arrays, saved while training goes on.

Orbax writes `<directory>/<step>/state` under a temporary name and renames it when
everything is on disk: a save that is killed or fails leaves the earlier steps as they
were. Just before that rename `checksums.json` is added, since the array files have no
checksums and a damaged one would be restored as wrong numbers.

The step is the number of finished iterations. Flush the metrics first, then save: then
every row below `step` is on disk whenever checkpoint `step` exists.
"""

import errno
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import cluster, disk, paths

PyTree = Any
Result = TypeVar("Result")

_ITEM = "state"
_CHECKSUMS = "checksums.json"
_ABOUT = "_CHECKPOINT_METADATA"  # orbax's file about a step
_BLOCK = 1 << 22
_PATTERN = re.compile(r"[*?\[\\]")


class Checkpointer:
    """The checkpoints of one run; the last `keep` of them stay on disk.

    `read_only=True` opens a run that may still be training: nothing is created,
    saved or cleaned up.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise UserError(f"checkpoint.keep: {keep}: at least 1")
        self.directory = paths.local(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise UserError(f"checkpoint: {self.directory}: no such folder")
        if not read_only:
            self._writing(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        logging.getLogger("absl").addFilter(_hide_orbax)
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            # Removes what a save that was killed left behind.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            self._manager = self._writing(
                lambda: ocp.CheckpointManager(
                    self._plainly_named(), options=options, item_names=(_ITEM,)
                )
            )
        except UserError:
            raise
        except (
            Exception
        ) as error:  # orbax reads a file of every step without checking it
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        """The error for an unreadable folder; names a step whose metadata is damaged."""
        for path in sorted(self.directory.glob(f"*/{_ABOUT}")):
            try:
                fine = isinstance(json.loads(path.read_text()), dict)
            except (OSError, ValueError, RecursionError):
                fine = False
            if not fine:
                return UserError(
                    f"checkpoint: {path.parent}: {_ABOUT} is damaged: delete that "
                    "folder to fall back to an earlier step"
                )
        return UserError(
            f"checkpoint: {self.directory}: cannot be read ({_first_line(error)}): "
            "delete the newest step in it, or take another --workdir"
        )

    def _plainly_named(self) -> Path:
        """The folder under a name that orbax cannot take for a pattern.

        Orbax looks for the parts of a checkpoint by a pattern that begins with the
        path. In `runs/[a]` it finds none of them, merges nothing, and the data is lost
        (seen with 0.12.8).
        """
        self._opened = None
        if not _PATTERN.search(str(self.directory)):
            return self.directory
        if not Path("/proc/self/fd").is_dir() or cluster.count() > 1:
            raise UserError(
                f"checkpoint: {self.directory}: must have none of * ? [ \\ in its path "
                "on this system, or with several processes: take another --workdir"
            )
        self._opened = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        return Path(f"/proc/self/fd/{self._opened}")

    def save(self, step: int, state: PyTree) -> None:
        """Starts to save `state`; returns once it is copied and may be donated.

        Leaves may be jax arrays (typed PRNG keys too), numpy arrays and Python numbers,
        but not arrays of size zero. A step that exists already is not saved again. An
        error in the background (a full disk) is raised here, in `wait` or in `close`.
        """
        self.wait()
        if cluster.first(lambda: step in self.steps()):
            return
        self._saving = step
        args = ocp.args.PyTreeSave(jax.tree.map(_storable, state))
        self._writing(
            lambda: self._manager.save(
                step, args=ocp.args.Composite(**{_ITEM: args}), force=True
            )
        )

    def steps(self) -> list[int]:
        """All finished checkpoints, oldest first."""
        steps = sorted(
            self._manager.all_steps()
        )  # orbax counts the one that is being saved
        return [step for step in steps if (self.directory / str(step)).is_dir()]

    def latest(self) -> int | None:
        """The newest finished checkpoint, None when there is none."""
        return cluster.first(lambda: max(self.steps(), default=None))

    def restore(
        self, state_like: PyTree, step: int | None = None, partial: bool = False
    ) -> PyTree:
        """The saved state, with the types and shardings of `state_like`.

        `state_like` holds arrays or `jax.ShapeDtypeStruct`s; their shardings may differ
        from the saved ones. `partial=True` reads only the leaves that it names.
        UserError for a leaf that was not saved, that has another shape, or whose type
        cannot be cast to the wanted one without loss; also for a damaged checkpoint,
        since the user decides which earlier one to go back to.
        """
        self.wait()
        step = cluster.first(lambda: self._existing(step))
        folder = self.directory / str(step)
        cluster.first(lambda: self._verify(folder, step))
        target = jax.tree.map(_abstract, state_like)
        args = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=partial,
        )
        try:
            item = Path(self._manager.directory) / str(step) / _ITEM
            if reason := _misfit(target, item):
                raise ValueError(reason)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_ITEM: args})
            )[_ITEM]
        except Exception as error:  # orbax raises bare Exceptions too
            raise self._unreadable(folder, step, _first_line(error)) from error
        return jax.tree.map(_as_like, state_like, restored)

    def wait(self) -> None:
        """Blocks until the running save, if there is one, is on disk."""
        self._writing(self._manager.wait_until_finished)
        self._saving = None

    def close(self) -> None:
        """Finishes the running save and ends orbax's threads."""
        self._writing(self._manager.close)
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"checkpoint: {self.directory}: holds no checkpoint")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"checkpoint: step {step}: {self.directory} has {steps}")
        return step

    def _writing(self, call: Callable[[], Result]) -> Result:
        """Runs `call`; errors of the file system become one line for the user."""
        try:
            return call()
        except (OSError, ValueError) as error:
            failure = _disk_failure(error)
            if failure is None:
                raise
            reason, remedy = failure
            raise UserError(
                f"checkpoint: {self.directory}: {reason}: the earlier checkpoints are "
                f"intact; {remedy}, then start the same command again"
            ) from error

    def _seal(self) -> None:
        """Adds sizes and CRC-32 of all files to the step's folder before its renaming."""
        if not cluster.is_first():
            return
        pattern = f"{self._saving}.orbax-checkpoint-tmp*"
        folder = next(self.directory.glob(pattern), None)
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), pattern)
        files = (path for path in sorted(folder.glob(f"{_ITEM}*/**/*")))
        sums = {
            # The item still has its temporary name, which becomes `state`.
            "/".join((_ITEM, *path.relative_to(folder).parts[1:])): [
                path.stat().st_size,
                _crc32(path),
            ]
            for path in files
            if path.is_file()
        }
        (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=0))

    def _verify(self, folder: Path, step: int) -> None:
        try:
            _check_sums(folder)
        except FileNotFoundError as error:
            reason = f"{Path(error.filename).name} is missing"
            raise self._unreadable(folder, step, reason) from error
        except (OSError, ValueError) as error:
            raise self._unreadable(folder, step, _first_line(error)) from error

    def _unreadable(self, folder: Path, step: int, reason: str) -> UserError:
        earlier = [other for other in self.steps() if other < step]
        remedy = (
            f"delete this folder to fall back to step {earlier[-1]}"
            if earlier
            else "delete this folder and metrics.jsonl to start from the beginning"
        )
        return UserError(
            f"checkpoint: {folder}: cannot be restored ({reason}): {remedy}"
        )


class Schedule:
    """Decides when to save: every few iterations, and when some minutes have passed.

    Args:
      every: number of iterations between saves.
      minutes: time since the last save; 0 never saves by time.
      clock: gives seconds; tests give their own.
    """

    def __init__(
        self, every: int, minutes: float, clock: Callable[[], float] = time.monotonic
    ):
        self._every, self._seconds = every, 60 * minutes or math.inf
        self._clock = clock
        self._saved = clock()

    def due(self, iteration: int) -> bool:
        """Whether to save at this iteration; if so, it counts as saved."""
        now = self._clock()
        due = iteration % self._every == 0 or now - self._saved >= self._seconds
        if due:
            self._saved = now
        return due


def _check_sums(folder: Path) -> None:
    """ValueError or OSError for a file of the state that is not as it was written."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_CHECKSUMS} is damaged") from error
    if not isinstance(sums, dict):
        raise ValueError(f"{_CHECKSUMS} is damaged")
    on_disk = {
        path.relative_to(folder).as_posix()
        for path in (folder / _ITEM).rglob(
            "[!.]*"
        )  # without hidden files, such as a file manager's
        if path.is_file()
    }
    if unknown := sorted(on_disk - sums.keys()):
        raise ValueError(f"{unknown[0]} is not of this checkpoint")
    for name, written in sums.items():
        path = folder / name
        actual = [path.stat().st_size, _crc32(path)]
        if written != actual:
            what = (
                "checksum"
                if isinstance(written, list) and written[:1] == actual[:1]
                else "size"
            )
            raise ValueError(f"{name} has the wrong {what}")


def _misfit(target: PyTree, item: Path) -> str:
    """Names a leaf of `target` that was not saved so; empty if there is none."""
    saved = ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().metadata(item).tree)
    for path, like in ocp.tree.to_flat_dict(target).items():
        name = "/".join(map(str, path))
        if path not in saved:
            return f"{name} is not in it"
        leaf = saved[path]
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            like = jax.eval_shape(jax.random.key_data, like)
        if leaf.shape != like.shape:
            return (
                f"{name}: an array of shape {leaf.shape} where {like.shape} is wanted"
            )
        if not np.can_cast(leaf.dtype, like.dtype, "safe"):
            return f"{name}: {leaf.dtype} where {like.dtype} is wanted"
    return ""


def _hide_orbax(record: logging.LogRecord) -> bool:
    """A log filter that drops orbax's lines: its failures are raised as exceptions."""
    return "orbax" not in Path(record.pathname).parts


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    """The leaf as an array; orbax copies numpy arrays before `save` returns."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind in "OUS":
        raise TypeError(f"not an array or a number: {leaf!r}")
    return array


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.asarray(leaf)


def _as_like(like: Any, leaf: Any) -> Any:
    """The restored leaf, as a Python number where `like` is one."""
    return type(like)(leaf) if isinstance(like, (bool, int, float)) else leaf


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _disk_failure(error: Exception) -> tuple[str, str] | None:
    """(what the file system said, what to do); None for any other error."""
    text, number = str(error), getattr(error, "errno", None)
    if code := re.search(r"os_error_code='?(\d+)", text):  # tensorstore writes it so
        number = int(code[1])
    if "RESOURCE_EXHAUSTED" in text or "No space left" in text:
        number = errno.ENOSPC
    elif text.startswith("NOT_FOUND"):  # a written file is gone; it has no errno
        number = errno.ENOENT
    if number is None:
        return None
    return disk.reason(number), disk.remedy(number)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
