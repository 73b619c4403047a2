"""The numbers of a run: metrics.jsonl, TensorBoard and, if the config names it, wandb.

Each call writes one JSON row: `iteration` and `kind` first, the rest in the caller's
order. Names that depend on the clock or the machine begin with `time/`; without those
fields a run that was killed and started again writes the same bytes as one that was
not.

Rows and checkpoints: a state that is saved as step i has finished the iterations below
i, and an evaluation *at* i is still to come. So a run that resumes at i keeps the rows
below i, removes the others and writes them again. Call `flush` before a checkpoint is
saved, so that no row can be lost.
"""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import metric_meanings, metric_names, paths
from flowgrpo_jax.runtime.workdir import (
    atomic_write,
    checkpoint_steps,
    parse_json,
    user_errors,
)

Number = int | float

_FILE = "metrics.jsonl"
_WANDB_ID = "wandb_id.txt"
WANDB_URL = "wandb_url.txt"  # where the run is seen: the page of the run links there


class Unwritten:
    """The rows of a process that writes none: another one of the run does."""

    rewritten = 0

    def write(
        self, iteration: int, scalars: Mapping[str, Any], kind: str = "train"
    ) -> None:
        """Does nothing."""

    def images(
        self, iteration: int, images: Mapping[str, Any], captions: Sequence[str] = ()
    ) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "Unwritten":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MetricWriter:
    """Writes the rows of one run.

    Args:
      workdir: the folder of metrics.jsonl and tensorboard/.
      start_iteration: the first iteration of this process; rows that an earlier process
        wrote from it on are removed.
      tensorboard: whether to write TensorBoard events too.
      wandb: arguments of `wandb.init` (project, name, mode ...), None for no wandb. A
        resumed run goes on in the same wandb run.
      config: that of the run, for the boards to show.
      boards: more of them, with the methods of `_Wandb`.

    `rewritten` counts the removed lines of an earlier process; they are written again.
    """

    def __init__(
        self,
        workdir: str | Path,
        start_iteration: int,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        boards: Sequence[Any] = (),
    ):
        workdir = Path(workdir)
        self._path = workdir / _FILE
        rows, self.rewritten = _keep_rows(self._path, start_iteration)
        self._wall_before = rows[-1].get(metric_names.WALL, 0.0) if rows else 0.0
        self._process = rows[-1].get(metric_names.PROCESS, 1) + 1 if rows else 1
        self._opened = time.monotonic()
        with user_errors(self._path):
            self._file = self._path.open("ab+", buffering=0)
        self._boards: list[Any] = []
        if tensorboard:
            from flowgrpo_jax.runtime.tensorboard import TensorBoardWriter

            with user_errors(workdir / "tensorboard"):
                self._boards.append(
                    TensorBoardWriter(workdir / "tensorboard", start_iteration)
                )
                if config and not start_iteration:
                    self._boards[0].write_config(config)
        if wandb is not None:
            self._boards.append(_Wandb(workdir, {"config": config} | dict(wandb)))
        self._boards += boards

    def write(
        self, iteration: int, scalars: Mapping[str, Any], kind: str = "train"
    ) -> None:
        """Writes one row of 0-d numbers; `kind` is "train" or "eval".

        Adds `time/wall` (seconds of this run so far, over all its processes),
        `time/process` (1 for the first of them) and `time/peak_memory_gb` (of this
        process on the host).
        """
        # One explicit transfer, of a list, since a pytree would sort the names.
        on_host = jax.device_get(list(scalars.values()))
        values = {
            name: number(name, x) for name, x in zip(scalars, on_host, strict=True)
        }
        values |= self._process_state()
        row = {"iteration": iteration, "kind": kind}
        if clash := row.keys() & values.keys():
            raise ValueError(f"reserved metric names: {sorted(clash)}")
        row |= {name: _json_number(value) for name, value in values.items()}
        self._append((json.dumps(row) + "\n").encode())
        for board in self._boards:
            with user_errors(self._path.parent):
                board.write_scalars(iteration, values)

    def images(
        self, iteration: int, images: Mapping[str, Any], captions: Sequence[str] = ()
    ) -> None:
        """Images [height, width, 3] or [n, height, width, 3] in [0, 1], for boards only.

        `captions`: one for each image, or none.
        """
        for board in self._boards:
            with user_errors(self._path.parent):
                board.write_images(iteration, images, captions)

    def flush(self) -> None:
        """Returns once all rows are on disk; call it before a checkpoint is saved."""
        with user_errors(self._path):
            os.fsync(self._file.fileno())
            for board in self._boards:
                board.flush()

    def close(self) -> None:
        """Flushes and closes all files."""
        self.flush()
        self._file.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _process_state(self) -> dict[str, float]:
        wall = self._wall_before + time.monotonic() - self._opened
        return {
            metric_names.WALL: round(wall, 3),
            metric_names.PROCESS: self._process,
            metric_names.PEAK_MEMORY: round(peak_memory_gb(), 3),
        }

    def _append(self, line: bytes) -> None:
        """Writes a whole line; on a full disk nothing of it remains in the file."""
        with user_errors(self._path):
            if not os.fstat(self._file.fileno()).st_nlink:
                self._put_back()
        end = os.fstat(self._file.fileno()).st_size
        with user_errors(self._path):
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(end)
                raise

    def _put_back(self) -> None:
        """Writes the file again after somebody removed it while it is open here."""
        self._file.seek(0)
        rows = self._file.read()
        atomic_write(self._path, rows)
        self._file.close()
        self._file = self._path.open("ab+", buffering=0)
        count = rows.count(b"\n")
        print(
            f"warning: {self._path}: was removed while the run goes on: put back with "
            f"its {count} rows",
            file=sys.stderr,
        )


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All whole rows of a workdir, in order; "NaN" and "Infinity" become floats."""
    path = paths.local(workdir) / _FILE
    return _rows(path, _lines(path))


def peak_memory_gb() -> float:
    """The largest host memory of this process so far, in units of 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _lines(path: Path) -> list[bytes]:
    """All whole lines; a last line that was cut off has no newline and is left out."""
    with user_errors(path):
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _rows(path: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            raise UserError(
                f"{path}: line {number}: not a row of metrics: "
                f"{_remedy(path.parent, rows)}"
            )
        rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if the line is not one that `MetricWriter` writes."""
    try:
        row = parse_json(line)
        if type(row["iteration"]) is not int or row["iteration"] < 0:
            return None
        if not isinstance(row["kind"], str):
            return None
        return {name: _from_json(name, value) for name, value in row.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _remedy(workdir: Path, before: Sequence[Mapping[str, Any]]) -> str:
    """What to do about a damaged row; a checkpoint from before it brings it back."""
    steps = checkpoint_steps(workdir)
    last = before[-1]["iteration"] if before else 0
    later = [step for step in steps if step > last]
    if not later:
        return "delete that line: the run writes it again when it goes on"
    if len(later) == len(steps):
        return (
            "delete that line to go on without its numbers, which only a new run in "
            "another --workdir can make again"
        )
    names = ", ".join(f"checkpoints/{step}" for step in later)
    return f"delete it and {names}: the run goes on before it and writes it again"


def _keep_rows(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Cuts the file back to the rows below iteration `start`, byte for byte.

    Also returns how many lines were cut. They will be written again, so they need not
    be rows.
    """
    lines = _lines(path)
    rows = [_row(line) for line in lines]
    end = next(
        (n for n, row in enumerate(rows) if row and row["iteration"] >= start),
        len(lines),
    )
    whole = next((n for n, row in enumerate(rows[:end]) if row is None), end)
    before = rows[whole - 1] if whole else None
    complete = (
        before is not None
        and before["kind"] == "train"
        and before["iteration"] == start - 1
    )
    complete &= not any(row and row["iteration"] < start for row in rows[whole:])
    if start == 0 or complete:
        end = whole if start else 0
    kept = b"".join(line + b"\n" for line in lines[:end])
    if path.exists() and kept != path.read_bytes():
        kept_rows = _rows(path, lines[:end])
        atomic_write(path, kept)
        return kept_rows, len(lines) - end
    return _rows(path, lines[:end]), 0


def number(name: str, value: Any) -> Number:
    """A Python number with the fewest digits that give the same value.

    For float32 and smaller types these are the digits of their precision (0.1, not
    0.10000000149011612). -0.0 becomes 0.0, since the two are equal.
    """
    array = np.asarray(value)
    if array.ndim != 0:
        raise ValueError(f"{name}: shape {array.shape} where a single number is wanted")
    if array.dtype.kind in "biu":
        return int(array)
    if array.dtype == np.float64:
        return float(array) + 0.0
    return float(str(array.astype(np.float32))) + 0.0


def _json_number(value: Number) -> Number | str:
    """The number, or a string for NaN and infinity, which JSON does not have."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(name: str, value: Any) -> Any:
    if name == "kind" or isinstance(value, int | float):
        return value
    return float(value)  # a string for a number that JSON does not have


class _Wandb:
    """A wandb run with the methods of a board."""

    def __init__(self, workdir: Path, arguments: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb: asked for but not installed: "
                "pip install wandb, or leave wandb out of the config"
            ) from error
        self._wandb = wandb
        id_file = workdir / _WANDB_ID
        if not id_file.exists():
            atomic_write(id_file, uuid.uuid4().hex[:12])
        run_id = id_file.read_text().strip()
        options = {"dir": str(workdir), "id": run_id, "resume": "allow", **arguments}
        self._run = wandb.init(**options)
        if url := getattr(self._run, "url", None):  # none offline
            atomic_write(workdir / WANDB_URL, url)
        # wandb's own step can only grow, but a resumed run writes iterations again.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        grouped = {metric_meanings.tag(name): value for name, value in scalars.items()}
        self._run.log({"iteration": step, **grouped})

    def write_images(
        self, step: int, images: Mapping[str, Any], captions: Sequence[str] = ()
    ) -> None:
        logged = {}
        for name, value in images.items():
            batch = np.asarray(value)
            batch = batch if batch.ndim == 4 else batch[None]
            pixels = np.round(batch * 255).astype(np.uint8)
            told = captions or [""] * len(pixels)
            logged[name] = [
                self._wandb.Image(image, caption=caption or None)
                for image, caption in zip(pixels, told, strict=True)
            ]
        self._run.log({"iteration": step, **logged})

    def flush(self) -> None:
        """Does nothing: wandb sends from a process of its own."""

    def close(self) -> None:
        self._run.finish()
