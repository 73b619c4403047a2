"""Checkpoints with bytes flipped, cut off, swapped; files removed, added, exchanged.

Oracle: what comes back is what was saved, to the bit, or one line that says why not. Two
small checkpoints of other values lie side by side, so a file of one can stand in the
other.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import strategies

from benchmarks.fuzz import core
from flowgrpo_jax.runtime.checkpoint import Checkpointer

Files = dict[str, bytes]
STEPS = (1, 2)


class Change(NamedTuple):
    """One damage; `first` and `second` choose files, `place` a byte, by remainders."""

    kind: str
    first: int
    second: int
    place: int
    data: bytes


def state(step: int) -> dict[str, Any]:
    values = np.random.default_rng(step)
    return {
        "params": {"kernel": values.normal(size=(3, 4)).astype(np.float32)},
        "count": np.arange(step, step + 5),
        "iteration": step,
    }


@functools.cache
def pristine() -> Files:
    """Two finished checkpoints: name -> content of all files."""
    with tempfile.TemporaryDirectory() as folder:
        with Checkpointer(folder) as checkpoints:
            for step in STEPS:
                checkpoints.save(step, state(step))
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


def _flipped(data: bytes, place: int, bits: bytes) -> bytes:
    changed = bytearray(data)
    for number, mask in enumerate(bits):
        changed[(place + number) % len(data)] ^= mask
    return bytes(changed)


def _swap(files: Files, one: str, other: str) -> None:
    files[one], files[other] = files[other], files[one]


def _moved(files: Files, one: str, to: str) -> None:
    files[to] = files.pop(one)


# What may be done to the files; "folder" names are those that a step might have.
CHANGES: dict[str, Callable[[Files, str, str, Change], object]] = {
    "flip": lambda files, one, other, change: files.update(
        {one: _flipped(files[one], change.place, change.data)}
    ),
    "cut": lambda files, one, other, change: files.update(
        {one: files[one][: change.place % len(files[one])]}
    ),
    "grow": lambda files, one, other, change: files.update(
        {one: files[one] + change.data}
    ),
    "replace": lambda files, one, other, change: files.update({one: change.data}),
    "insert": lambda files, one, other, change: files.update(
        {
            one: files[one][: change.place % len(files[one])]
            + change.data
            + files[one][change.place % len(files[one]) :]
        }
    ),
    "remove": lambda files, one, other, change: files.pop(one),
    "swap": lambda files, one, other, change: _swap(files, one, other),
    "copy": lambda files, one, other, change: files.update({one: files[other]}),
    "move": lambda files, one, other, change: _moved(files, one, other),
    "add": lambda files, one, other, change: files.update(
        {f"{Path(one).parent}/{change.data.hex()[:40] or 'x'}": change.data}
    ),
    "step": lambda files, one, other, change: files.update(
        {f"{_STRAY[change.place % len(_STRAY)]}/state/x": change.data}
    ),
    "remove folder": lambda files, one, other, change: [
        files.pop(name)
        for name in list(files)
        if name.startswith(str(Path(one).parent))
    ],
    "sums": lambda files, one, other, change: files.update(
        {"2/checksums.json": _SUMS[change.place % len(_SUMS)]}
    ),
}
_STRAY = ("3", "20", "02", "-1", "1.5", "x", "3.orbax-checkpoint-tmp", "٣", "9" * 30)
_SUMS = (b"{}", b"[]", b"null", b"1", b'"x"', b'{"state": 1}', b"[" * 10_000, b"")


def inputs() -> strategies.SearchStrategy:
    change = strategies.builds(
        Change,
        kind=strategies.sampled_from(sorted(CHANGES)),
        first=strategies.integers(0, 99),
        second=strategies.integers(0, 99),
        place=strategies.integers(0, 2000),
        data=strategies.binary(min_size=1, max_size=8),
    )
    return strategies.lists(change, min_size=1, max_size=3)


def damaged(changes: list[Change]) -> Files:
    files = dict(pristine())
    for change in changes:
        names = sorted(name for name in files if files[name])
        if names:
            one = names[change.first % len(names)]
            other = names[change.second % len(names)]
            CHANGES[change.kind](files, one, other, change)
    return files


def check(changes: list[Change]) -> str:
    return restored(damaged(changes), read_only=len(changes) > 1)


def check_bytes(data: bytes) -> str:
    """As the checksums of the newest one."""
    return restored(pristine() | {"2/checksums.json": data}, read_only=True)


def restored(files: Files, read_only: bool) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        for file, data in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        with core.refused() as lines:
            with Checkpointer(folder, read_only=read_only) as checkpoints:
                step = checkpoints.latest()
                got = checkpoints.restore(state(0), step)
                _compare(got, step)
        shutil.rmtree(folder)
    return core.REFUSED if lines else core.RIGHT


def _compare(got: Any, step: int | None) -> None:
    if step not in STEPS:
        raise core.Wrong(f"step {step} was never saved")
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, got, state(step)))):
        raise core.Wrong(f"step {step} came back with other numbers")


def surface() -> core.Surface:
    return core.Surface(
        "checkpoints",
        inputs(),
        check,
        seeds=[pristine()["2/checksums.json"], *_SUMS],
        check_bytes=check_bytes,
        seconds=60.0,  # it reads and writes files: on a busy machine that may take long
    )
