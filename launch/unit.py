"""What every back end starts: one unit, its log, and how it ended.

python -m launch.unit --config=FILE.py ... --workdir=DIR    the flags of flowgrpo_jax.main

It runs `flowgrpo_jax.main`; DIR gets log.txt, all that the run printed, and unit.json,
from which a launcher and `launch.table` read how far it is, on whatever machine it ran:
words, host, process ids, times, exit code.

A unit of several processes (nodes of SLURM, pods, workers of a TPU) is this command once
on each of their machines; `main` joins them and ends them together. Log and record are
of the first one; what the others print is for whoever started them, beside
logs/process_K.log of `main` itself.

Only the standard library is imported: a unit takes no memory beside its run.
"""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

RECORD, LOG = "unit.json", "log.txt"
MAIN = (sys.executable, "-m", "flowgrpo_jax.main")
# Cores of a CPU that the unit may use, "0,1"; devices of other kinds have variables of
# their own (CUDA_VISIBLE_DEVICES).
CPUS = "LAUNCH_CPUS"
# Process id of a launcher on this machine, with which the unit is to end.
LAUNCHER = "LAUNCH_PID"
# Which process of its unit this is: as a launcher says it, SLURM, a TPU, an indexed job
# of Kubernetes, or SkyPilot.
PROCESS = "LAUNCH_PROCESS"
_PROCESSES = (
    PROCESS,
    "SLURM_PROCID",
    "TPU_WORKER_ID",
    "JOB_COMPLETION_INDEX",
    "SKYPILOT_NODE_RANK",
)
# Ended by a signal, or by the loss of another process, after a checkpoint: to be started
# again.
SAVED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# Asks for a stop are passed on as what `main` saves for; USR1 and USR2 would end it.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_BEAT = 15.0  # seconds between two touches of unit.json
_SILENCE = 120.0  # of another host: longer than this, and the unit is no longer there
_TURN = 0.1  # seconds between two looks at the run
_PIDS = ("pid", "child")
_DEVICES = (  # variables that give a process some of a machine's
    "CUDA_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "TPU_PROCESS_BOUNDS",
)
_PR_SET_PDEATHSIG = 1

# What `run` has started in this process: the run, its workdir and its record.
_running: list[tuple[subprocess.Popen, Path, dict[str, Any]]] = []


def run(
    words: Sequence[str], shared: bool = False, command: Sequence[str] = MAIN
) -> int:
    """Run one unit to its end and return its exit code, 128 + N after signal N.

    `shared`: whoever stops this process signals the run as well (a SLURM step), which
    would take the same signal from here for a second one and not save; `stop` ends it.
    """
    workdir = Path(_workdir(words))
    if process():
        return _exit_code(_start(words, command, shared, None).wait())
    workdir.mkdir(parents=True, exist_ok=True)
    before = read(workdir) or {}
    while is_running(workdir):
        time.sleep(_TURN)  # that of a launcher that was killed is still saving
    record: dict[str, Any] = {
        "words": list(words),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "starts": before.get("starts", 0) + 1,
    }
    with (workdir / LOG).open("ab") as log:
        log.write(f"$ {by_hand(words, _cpus(), command)}\n".encode())
        log.flush()
        begin = log.tell()
        child = _start(words, command, shared, log)
    _running.append((child, workdir, record))
    if launcher := os.environ.get(LAUNCHER):
        end_with(int(launcher))
    _write(workdir, record | {"child": child.pid})
    with (workdir / LOG).open("rb") as told:
        told.seek(begin)
        code = _exit_code(_follow(child, workdir, told))
    _write(workdir, record | {"code": code, "ended": time.time()})
    return code


def process() -> int:
    """Which process of its unit this is, from 0; 0 for a unit that is one process."""
    return int(next(filter(None, map(os.environ.get, _PROCESSES)), 0))


def read(workdir: Path) -> dict[str, Any] | None:
    """What unit.json holds; None if the unit was never started there."""
    try:
        return dict(json.loads((workdir / RECORD).read_text()))
    except (OSError, ValueError):
        return None


def is_running(workdir: Path) -> bool:
    """Whether a process works on the unit now, here or on a host that still writes."""
    record = read(workdir) or {}
    return any(_is_running(record.get(pid), record, workdir) for pid in _PIDS)


def stop() -> None:
    """Ask the runs that `run` started in this process to save, and wait until they end.

    May be called by a handler of a signal that interrupted `run`, which may hold the
    lock of its Popen: hence not `child.wait`.
    """
    for child, workdir, record in _running:
        child.terminate()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        _write(workdir, record | {"code": 128 + signal.SIGTERM, "ended": time.time()})


def by_hand(
    words: Sequence[str], cpus: Sequence[int] = (), command: Sequence[str] = MAIN
) -> str:
    """The line for a shell that runs the same on the same devices."""
    visible = [
        f"{name}={value}" for name, value in os.environ.items() if name in _DEVICES
    ]
    pinned = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
    start = ["env", *visible] if visible else []
    return shlex.join([*start, *pinned, *command, *words])


def _start(
    words: Sequence[str], command: Sequence[str], shared: bool, log: IO[bytes] | None
) -> subprocess.Popen:
    """The run, whose lines go to `log`, or to where this process's own go."""
    here, cpus = os.getpid(), _cpus()
    child = subprocess.Popen(
        [*command, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log and subprocess.STDOUT,
        start_new_session=not shared,
        preexec_fn=lambda: _prepare(here, cpus),
    )
    if not shared:
        _pass_on(child)
    return child


def _cpus() -> list[int]:
    return [int(core) for core in os.environ.get(CPUS, "").split(",") if core]


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _workdir(words: Sequence[str]) -> str:
    for word in words:
        if word.startswith("--workdir="):
            return word.removeprefix("--workdir=")
    raise SystemExit("error: --workdir: missing: give the folder of the unit")


def _prepare(parent: int, cpus: Sequence[int]) -> None:
    """In the child, before it becomes the run: its cores, and its end with ours."""
    if cpus:
        os.sched_setaffinity(0, cpus)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # of schedulers, to a whole step
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)


def end_with(parent: int) -> None:
    """SIGTERM for this process once its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _pass_on(child: subprocess.Popen) -> None:
    def handle(number: int, frame: object) -> None:
        del frame
        asked = number if number == signal.SIGINT else signal.SIGTERM
        child.send_signal(asked)

    for number in _STOP:
        signal.signal(number, handle)


def _follow(child: subprocess.Popen, workdir: Path, told: Any) -> int:
    """Wait for the run; meanwhile show what it prints and sign that it is alive."""
    beat = time.monotonic()
    while True:
        code = child.poll()
        _show(told.read())
        if code is not None:
            return code
        if time.monotonic() - beat > _BEAT:
            beat = time.monotonic()
            os.utime(workdir / RECORD)
        time.sleep(_TURN)


def _show(text: bytes) -> None:
    try:
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):  # whoever read it is gone: the log has it
        pass


def _write(workdir: Path, record: Mapping[str, Any]) -> None:
    new = workdir / f".{RECORD}.new"
    new.write_text(json.dumps(record) + "\n")
    os.replace(new, workdir / RECORD)


def _is_running(pid: int | None, record: Mapping[str, Any], workdir: Path) -> bool:
    if pid in (None, os.getpid()) or "code" in record:
        return False  # a new container on the same host gives the same numbers again
    if record.get("host") != socket.gethostname():
        return time.time() - (workdir / RECORD).stat().st_mtime < _SILENCE
    try:
        os.kill(pid, 0)
        command = Path(f"/proc/{pid}/cmdline")  # a number may belong to another by now
        if not command.parent.parent.joinpath("self").exists():  # no such files here
            return True
        return workdir.name.encode() in command.read_bytes()
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:  # somebody's else: the number was given away
        return False


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
