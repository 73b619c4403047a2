"""Disk faults while a run goes on: what is said, what is kept, does it go on.

    python -m benchmarks.disk_faults --folder=DIR [--write]

A full disk (a small tmpfs that is filled), a place that becomes read-only (a bind mount),
one that may not be written to (chattr +i, which binds root too) and one that is removed;
in the checkpoints, the metrics, the samples, the report and the embedding cache of a tiny
run. Needs root. A file that is open already can still be written to: for the metrics
the read-only and the forbidden one are met at the next start.

A row: was there one line and exit code 2; seconds from the line to the end of the
process; the iteration that the same command went on from once all was mended (the newest
checkpoint, whose checksums were right); are rows and weights the undisturbed run's.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import kill, sections

TITLE = "Disk faults"
FAULTS = ("disk full", "read-only", "no permission", "removed")
PLACES = ("checkpoint", "metrics", "samples", "report", "cache")
_MEGABYTES = 96

CACHE = """
import sys
import numpy as np
from flowgrpo_jax.data.embedding_cache import EmbeddingCache, Field
from flowgrpo_jax.errors import UserError
try:
    cache = EmbeddingCache(sys.argv[1], {}, {"x": Field((250_000,), np.dtype("float32"))})
    for number, text in enumerate(["a", "b", "c"]):
        with cache.exclusively():
            if cache.missing([text]):
                cache.add([text], {"x": np.full((1, 250_000), number, "float32")})
        print("added", flush=True)
        if sys.argv[2] == "wait" and number == 0:
            input()
    print(float(cache.rows(["a", "b", "c"])["x"].sum()), flush=True)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


class Seen(NamedTuple):
    """What a process said of a fault, and how it ended."""

    code: int
    told: str
    seconds: float  # from its line to its end

    @property
    def right(self) -> bool:
        """One line and exit code 2; or the run made good what was removed."""
        if self.code == 0:
            return "Traceback" not in self.told
        lines = [line for line in self.told.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.told


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextlib.contextmanager
def broken(fault: str, disk: Path, place: Path) -> Iterator[None]:
    """Until it is mended, `place` on the file system of `disk` has this fault."""
    filler = disk / "filler"
    if fault == "disk full":
        with filler.open("wb") as file:
            size = shutil.disk_usage(disk).free
            while size:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), size)
                    file.seek(0, os.SEEK_END)
                except OSError:
                    size //= 2
    elif fault == "read-only":
        run("mount", "--bind", place, place)
        run("mount", "-o", "remount,bind,ro", place)
    elif fault == "no permission":
        run("chattr", "+i", place)
    elif place.is_dir():
        while place.exists():  # the run may be writing into it
            shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink()
    try:
        yield
    finally:
        if fault == "disk full":
            filler.unlink()
        elif fault == "read-only":
            run("umount", "-l", place)
        elif fault == "no permission":
            run("chattr", "-i", place)


def wait_for(process: subprocess.Popen, holds: Callable[[], bool]) -> bool:
    """Whether that came to hold before the process ended."""
    while process.poll() is None:
        if holds():
            return True
        time.sleep(0.01)
    return False


def to_its_end(process: subprocess.Popen, log: Path) -> Seen:
    wait_for(process, lambda: "error: " in log.read_text())
    said = time.monotonic()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return Seen(process.returncode, log.read_text(), time.monotonic() - said)


def has_row(workdir: Path, iteration: int, kind: str) -> bool:
    path = workdir / "metrics.jsonl"
    told = path.read_text() if path.exists() else ""
    return f'{{"iteration": {iteration}, "kind": "{kind}"' in told


def of_a_run(
    folder: Path, disk: Path, place: str, fault: str
) -> tuple[Seen, str, bool]:
    """(what was seen, where it went on from, equal rows and weights)."""
    workdir, log = disk / "run", folder / "log"
    log.write_bytes(b"")
    where = {
        "checkpoint": workdir / "checkpoints",
        "metrics": workdir / "metrics.jsonl",
        "samples": workdir / "samples",
        "report": workdir,
    }[place]
    row = (4, "eval") if place == "report" else (2, "train")
    at_start = place == "metrics" and fault in ("read-only", "no permission")
    with log.open("ab") as file:
        process = kill.start(folder, workdir, file)
        assert wait_for(process, lambda: has_row(workdir, *row)), log.read_text()
        if at_start:
            process.kill()
            process.wait()
            log.write_text("")
        with broken(fault, disk, where):
            if at_start:
                process = kill.start(folder, workdir, file)
            seen = to_its_end(process, log)
    if place == "report" and fault == "removed":  # as the next start tells one to
        shutil.rmtree(workdir, ignore_errors=True)
    with log.open("wb") as file:
        code = kill.start(folder, workdir, file).wait()
    told = log.read_text()
    assert code == 0, told
    went_on = [line for line in told.splitlines() if "going on from iteration" in line]
    step = went_on[0].split("iteration ")[1].split(":")[0] if went_on else "-"
    return seen, step, kill.same(folder / "quiet", workdir)


def of_the_cache(folder: Path, disk: Path, fault: str) -> tuple[Seen, str, bool]:
    """The same of the embedding cache, which a model with text encoders fills."""
    cache, log = disk / "cache", folder / "log"

    def start(how: str, file) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", CACHE, str(cache), how],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
        )

    log.write_bytes(b"")
    with log.open("ab") as file:
        if fault in ("read-only", "no permission"):  # what is open can be appended to
            cache.mkdir()
            with broken(fault, disk, cache):
                seen = to_its_end(start("go", file), log)
        else:
            process = start("wait", file)
            assert wait_for(process, lambda: "added" in log.read_text())
            with broken(fault, disk, cache):
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.close()
                seen = to_its_end(process, log)
        start("go", file).wait()
    return seen, "-", log.read_text().split()[-1:] == ["750000.0"]


def cell(folder: Path, place: str, fault: str) -> str:
    """One row of the table; the work lies on a disk of its own where that is filled."""
    disk = folder / "disk"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir(parents=True)
    small = fault == "disk full"
    try:
        if small:
            run("mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", disk)
        try:
            if place == "cache":
                seen, step, equal = of_the_cache(folder, disk, fault)
            else:
                seen, step, equal = of_a_run(folder, disk, place, fault)
        finally:
            if small:
                run("umount", "-l", disk)
    except subprocess.CalledProcessError as error:
        return f"| {place} | {fault} | not possible here: {error.stderr} | | | |"
    if not seen.right:
        print(f"--- {place}: {fault}\n{seen.told}", file=sys.stderr)
    lines = [line for line in seen.told.splitlines() if line.startswith("error: ")]
    line = lines[0].replace(str(disk), "DIR")[7:] if lines else ""
    what = f"`{line}`" if seen.right else f"exit code {seen.code}; {line}"
    if seen.code == 0:
        warned = [line for line in seen.told.splitlines() if "was removed" in line]
        what = "the run goes on to its end" + "".join(f": `{w}`" for w in warned)
        what = what.replace(str(disk), "DIR")
    yes = "yes" if equal else "no"
    return f"| {place} | {fault} | {what} | {seen.seconds:.1f} | {step} | {yes} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--place", choices=PLACES, action="append")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument("--write", action="store_true", help="to docs/reliability.md")
    chosen = parser.parse_args()
    folder = chosen.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "quiet" / "weights.safetensors").exists():
        with (folder / "log").open("wb") as file:
            assert kill.start(folder, folder / "quiet", file).wait() == 0
    known = folder / "rows.json"
    done = json.loads(known.read_text()) if known.exists() else {}
    rows = []
    for place in chosen.place or PLACES:
        for fault in chosen.fault or FAULTS:
            key = f"{place}: {fault}"
            if key not in done:
                done[key] = cell(folder, place, fault)
                known.write_text(json.dumps(done))
                print(done[key], flush=True)
            rows.append(done[key])
    text = "\n".join(
        [
            "| in | fault | line | ends after, s | goes on from | equal |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    print(text)
    if chosen.write:
        command = "python -m benchmarks.disk_faults --folder=DIR --write"
        sections.write(TITLE, command, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
