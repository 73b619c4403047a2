"""Damage to a workdir between two starts: named in one line, or mended."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.attacks.table import TINY, Row, command, result, row, train


def _flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def _largest(folder: Path) -> Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def _newest(workdir: Path) -> Path:
    steps = [
        path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    ]
    return max(steps, key=lambda path: int(path.name))


CHECKPOINT: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda w: _flip(_largest(_newest(w) / "state")),
    "missing file": lambda w: _largest(_newest(w) / "state").unlink(),
    "empty checksums": lambda w: (_newest(w) / "checksums.json").write_text(""),
    "stray folder": lambda w: (w / "checkpoints" / "20").mkdir(),
}
CONFIG: dict[str, str] = {
    "broken": '{"seed": ',
    "empty": "",
    "unknown key": '{"seeed": 1}',
    "deep": "[" * 100_000,
}
WEIGHTS: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda path: _flip(path, 0.9),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "garbage header": lambda path: path.write_bytes(b"\xff" * 4096),
}


def rows() -> Iterator[Row]:
    """All of them on copies of one run of six iterations."""
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        first = train(done)
        assert first.code == 0, first.told
        copies = (Path(folder) / f"copy{number}" for number in range(1000))

        def copy() -> Path:
            made = next(copies)
            shutil.copytree(done, made)
            return made

        yield _checkpoints(copy)
        yield _metrics(copy, done)
        yield _configs(copy)
        yield _weights(copy)
        yield _pictures(copy)
        yield _two_at_once(next(copies), done)


def _goes_on(workdir: Path) -> tuple[str, ...]:
    """One iteration more than the run had."""
    return (f"--workdir={workdir}", *TINY, "--config.num_iterations=7")


def _checkpoints(copy) -> Row:
    outcomes = []
    for name, damage in CHECKPOINT.items():
        workdir = copy()
        damage(workdir)
        ended = command("main", *_goes_on(workdir))
        named = "delete this folder" in ended.told
        outcomes.append(
            ended.wrong or (None if named else f"{name}: no folder to delete is named")
        )
    return row(
        f"checkpoint: {', '.join(CHECKPOINT)}", outcomes, "named, with what to delete"
    )


def _metrics(copy, done: Path) -> Row:
    torn, garbage = copy(), copy()
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "ki')
    lines = (garbage / "metrics.jsonl").read_text().splitlines(keepends=True)
    (garbage / "metrics.jsonl").write_text(
        "".join([*lines[:2], "\0\0\0\n", *lines[2:]])
    )
    mended = command("main", *TINY, f"--workdir={torn}")
    told = command("main", *TINY, f"--workdir={garbage}")
    same = mended.code == 0 and result(torn)[0] == result(done)[0]
    return row(
        "metrics.jsonl: torn last line, garbage in the middle",
        [None if same else f"torn: exit code {mended.code}", told.wrong],
        "mended; one line",
    )


def _configs(copy) -> Row:
    outcomes = []
    for text in CONFIG.values():
        workdir = copy()
        (workdir / "config.json").write_text(text)
        outcomes.append(command("evaluate", f"--workdir={workdir}").wrong)
    return row(f"config.json: {', '.join(CONFIG)}", outcomes, "one line")


def _weights(copy) -> Row:
    outcomes = []
    for damage in WEIGHTS.values():
        path = copy() / "weights.safetensors"
        damage(path)
        arguments = ("--config=configs/geneval.py", f"--config.model={path}")
        outcomes.append(command("evaluate", *arguments).wrong)
    return row(f"weights: {', '.join(WEIGHTS)}", outcomes, "one line")


def _pictures(copy) -> Row:
    workdir = copy()
    (workdir / "report.html").unlink()
    for path in (workdir / "samples").iterdir():
        path.write_bytes(b"no picture")
    ended = train(workdir)
    written = ended.code == 0 and (workdir / "report.html").is_file()
    return row(
        "broken pictures in samples/",
        [None if written else f"exit code {ended.code}"],
        "the report is written all the same",
    )


def _two_at_once(workdir: Path, done: Path) -> Row:
    first = subprocess.Popen(
        [sys.executable, "-m", "flowgrpo_jax.main", *TINY, f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (workdir / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.1)
    second = train(workdir)
    unharmed = first.wait() == 0 and result(workdir) == result(done)
    named = str(first.pid) in second.told
    wrong = second.wrong or (None if named else "the second did not name the process")
    return row(
        "two runs in one workdir",
        [wrong or (None if unharmed else "the first run was harmed")],
        "the second is refused in one line with the first one's number",
    )
