"""Workdirs: whatever lies in one when a run starts, and whatever it is called.

Oracle: either one line, and every byte that was recorded is as it was; or the run goes
on, and every row below the checkpoint that it goes on from is there, in order.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz.core import REFUSED, RIGHT, Surface, Wrong, refused
from flowgrpo_jax import config as configs
from flowgrpo_jax.report import page
from flowgrpo_jax.runtime import environment
from flowgrpo_jax.runtime.metrics import MetricWriter, read_metrics
from flowgrpo_jax.runtime.workdir import (
    checkpoint_steps,
    finished_line,
    open_workdir,
    read_config,
)

CONFIG = {
    "seed": 1,
    "num_iterations": 8,
    "checkpoint": {"every": 2},
    "log": {"every": 1},
}
DIGESTS = {"prompts": "a" * 8, "eval.prompts": "b" * 8}
_MEMORY = Path("/dev/shm")
ENVIRONMENT = {"platform": "cpu", "jax": "1.0"}
# Names of which Linux takes all; the file system has the last word.
_LETTERS = st.sampled_from("ab[]*?\\{}%~!$&'\"#:;|<>^=+,@ .-_\n\t\x01ü😀")
_NAMES = st.one_of(
    st.text(_LETTERS, min_size=1, max_size=12),
    st.sampled_from(["[exp1]", "a" * 255, "a" * 256, "a\udcff", "\ud800", "a\0b", "~"]),
    st.text(max_size=5),
)
_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())
_BYTES = st.one_of(
    st.binary(max_size=30),
    _JSON,
    st.sampled_from([b"[" * 50_000, b"9" * 5000, b'{"a":' * 3000, b"", b"\n", b"\xff"]),
)


def _row(iteration: int, kind: str = "train") -> bytes:
    return json.dumps({"iteration": iteration, "kind": kind, "loss": 0.5}).encode()


# A line of metrics.jsonl that is not the one which was written.
_LINES = st.one_of(
    _BYTES.map(lambda data: data.replace(b"\n", b" ")),
    st.integers(-1, 9).map(_row),
    st.dictionaries(
        st.sampled_from(["iteration", "kind", "loss"]),
        st.one_of(st.integers(-2, 9), st.floats(), st.text(max_size=4), st.none()),
    ).map(lambda row: json.dumps(row).encode()),
)
_FILES = ("config.json", "prompts.json", "environment.json", "report.json", ".lock")
_DAMAGE = st.one_of(
    st.tuples(st.just("bytes"), st.sampled_from(_FILES), _BYTES),
    st.tuples(st.just("cut"), st.sampled_from(_FILES), st.integers(0, 200)),
    st.tuples(
        st.just("folder"), st.sampled_from([*_FILES, "metrics.jsonl"]), st.none()
    ),
    st.tuples(st.just("gone"), st.sampled_from([*_FILES, "metrics.jsonl"]), st.none()),
    st.tuples(st.just("line"), st.integers(0, 8), _LINES),
    st.tuples(st.just("swap"), st.integers(0, 8), _LINES),
    st.tuples(st.just("torn"), st.integers(0, 8), st.integers(1, 20)),
    st.tuples(st.just("lost"), st.sampled_from(["all", "newest", "folder"]), st.none()),
    st.tuples(st.just("stray"), st.text(max_size=6), st.none()),
)


def surface() -> Surface:
    recorded = st.fixed_dictionaries(
        {
            "name": st.one_of(st.just("run"), st.just("run"), _NAMES),
            "rows": st.integers(0, 8),
            "damage": st.lists(_DAMAGE, max_size=2),
            "last": st.sampled_from([8, 8, 8, 12, 5, 2, 0]),
            "digest": st.sampled_from(["a" * 8, "a" * 8, "a" * 8, "c" * 8]),
        }
    )
    seeds = (_row(0) + b"\n" + _row(1) + b"\n", json.dumps(CONFIG).encode())
    return Surface("workdirs", recorded, check, seeds, check_bytes, seconds=10.0)


def check(given: dict[str, Any]) -> str:
    with _folder() as folder:
        workdir = folder / given["name"]
        with refused() as lines:
            try:
                _record(workdir, given["rows"])
            except OSError:  # the file system does not take the name
                return RIGHT
            for damage in given["damage"]:
                _damage(workdir, *damage)
            _start(workdir, given["last"], DIGESTS | {"prompts": given["digest"]})
        return REFUSED if lines else RIGHT


def check_bytes(data: bytes) -> str:
    """Any bytes in each of the files in turn."""
    outcome = RIGHT
    for name in (*_FILES, "metrics.jsonl"):
        with _folder() as folder:
            with refused() as lines:
                _record(folder / "run", 4)
                (folder / "run" / name).write_bytes(data)
                _start(folder / "run", 8, DIGESTS)
            outcome = REFUSED if lines else outcome
    return outcome


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    # In memory where there is such a folder: every start waits for its disk.
    folder = Path(tempfile.mkdtemp(dir=_MEMORY if _MEMORY.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(os.fsencode(folder), ignore_errors=True)


def _record(workdir: Path, rows: int) -> None:
    """What a run of so many iterations leaves."""
    with open_workdir(workdir, CONFIG, configs.MAY_DIFFER, DIGESTS) as place:
        if place.path != workdir:
            raise Wrong(f"another folder: {place.path}")
        place.checkpoints.mkdir()
        for step in range(2, rows + 1, 2):
            (place.checkpoints / str(step)).mkdir()
        place.metrics.write_bytes(b"".join(_row(i) + b"\n" for i in range(rows)))
        entries = [{"from_iteration": 0, "environment": ENVIRONMENT}]
        (place.path / "environment.json").write_text(json.dumps(entries))
        (place.path / "report.json").write_text('{"command": "x"}')


def _damage(workdir: Path, how: str, what: Any, how_much: Any) -> None:
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    with contextlib.suppress(OSError):  # a second damage to what is gone
        if how in ("bytes", "cut", "folder", "gone"):
            path = workdir / what
            data = path.read_bytes()
            path.unlink()
            if how == "bytes":
                path.write_bytes(how_much)
            elif how == "cut":
                path.write_bytes(data[:how_much])
            elif how == "folder":
                path.mkdir()
        elif how in ("line", "swap", "torn"):
            lines = metrics.read_bytes().splitlines()
            if how == "torn":
                metrics.write_bytes(b"\n".join(lines)[:-how_much])
                return
            place = min(what, len(lines))
            lines[place : place + (how == "swap")] = [how_much]
            metrics.write_bytes(b"\n".join(lines) + b"\n")
        elif how == "stray":
            with contextlib.suppress(ValueError):
                (checkpoints / what).mkdir()
        elif what == "folder":
            shutil.rmtree(checkpoints)
        else:
            steps = checkpoint_steps(workdir)
            for step in steps if what == "all" else steps[-1:]:
                (checkpoints / str(step)).rmdir()


def _start(workdir: Path, last: int, digests: dict[str, str]) -> None:
    """As train.py does, but for the training."""
    before = _contents(workdir)
    try:
        with open_workdir(
            workdir, CONFIG | {"num_iterations": last}, configs.MAY_DIFFER, digests
        ) as place:
            start = max(checkpoint_steps(place.path), default=0)
            finished_line(place.path, last)
            environment.record(place.path, start)
            MetricWriter(place.path, start, tensorboard=False).close()
    except Exception:
        _same(before, _contents(workdir))
        raise
    if digests != DIGESTS and "prompts.json" in before:
        raise Wrong("other prompts, and not a word")
    if read_config(workdir)["num_iterations"] != last:
        raise Wrong("config.json holds another config")
    _rows_are_there(before.get("metrics.jsonl", b""), read_metrics(workdir), start)
    page.write_report(workdir)


def _contents(workdir: Path) -> dict[str, bytes]:
    """What was recorded; config.json may get another num_iterations on the way."""
    names = ("metrics.jsonl", "prompts.json", "report.json")
    paths = [workdir / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _same(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    for name, data in before.items():
        if after.get(name) != data and name != "prompts.json":
            raise Wrong(f"{name} was changed, and the start refused")


def _rows_are_there(before: bytes, rows: list[dict], start: int) -> None:
    """Of the lines that were rows, those below the checkpoint, to the first later one."""
    kept = [json.dumps(row) for row in rows]
    if any(row["iteration"] >= start for row in rows):
        raise Wrong("rows that will be written a second time")
    for line in before.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            iteration, kind = row["iteration"], row["kind"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(iteration) is not int or iteration < 0 or not isinstance(kind, str):
            continue
        if iteration >= start:
            break
        if not kept:
            raise Wrong(f"row {iteration} is gone")
        kept.pop(0)
