"""A `main` for the tests of launchers: it writes rows as the real one does, at once."""

import os
import sys
from pathlib import Path

import flowgrpo_jax
from launch import sweep_dir, units

# Reads --act=WORD from its flags; leaves a line in --events=FILE when it starts and ends.
MAIN = """
import json, os, signal, sys, time
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir, act = flags["workdir"], flags.get("act", "finish")
first = not os.path.exists(f"{workdir}/metrics.jsonl")
def event(word):
    with open(flags["events"], "a") as file:
        file.write(f"{word} {os.path.basename(workdir)}\\n")
def stop(number, frame):
    event("saved")
    print("SIGTERM: saving, then stopping", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
with open(f"{workdir}/config.json", "w") as file:
    json.dump({"num_iterations": 2, "seed": int(flags.get("config.seed", 0))}, file)
event("start")  # whoever waits for it may send a signal
def write(iteration, kind="train", **values):
    with open(f"{workdir}/metrics.jsonl", "a") as file:
        row = {"iteration": iteration, "kind": kind, "time/wall": 2.0 * iteration}
        file.write(json.dumps(row | values) + "\\n")
write(0, reward_avg=0.25)
if act == "refuse":
    print("error: seed: -1: must be at least 0", flush=True)
    sys.exit(2)
if act == "die" or act == "die once" and first:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait" or act == "wait once" and first:
    while not os.path.exists(flags["gate"]):
        time.sleep(0.02)
time.sleep(float(flags.get("seconds", 0)))
write(1, reward_avg=0.5)
score = float(flags.get("score", 0.5))
write(2, "eval", eval_overall_accuracy=score)
event("end")
"""


def install(folder: Path, monkeypatch) -> None:
    """From here on `python -m flowgrpo_jax.main` is the fake one, in child processes.

    All else of the package is the real one's.
    """
    package = folder / "fake" / "flowgrpo_jax"
    package.mkdir(parents=True)
    real = str(Path(flowgrpo_jax.__file__).parent)
    (package / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (package / "main.py").write_text(MAIN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(folder)  # the working folder comes before all others


def sweep(folder: Path, points, xid="1"):
    """ROOT/XID of these points; every unit leaves its events in one file."""
    extra = [f"--events={folder / 'events.txt'}", f"--gate={folder / 'gate'}"]
    made = units.make("configs/geneval.py", points, extra)
    return sweep_dir.open_sweep(str(folder / "my runs"), xid, made, "launch.test")


def events(folder: Path) -> list[str]:
    file = folder / "events.txt"
    return file.read_text().splitlines() if file.exists() else []


def script(folder: Path, name: str, text: str, monkeypatch) -> None:
    """A program of this name that is found before any other: Python source `text`."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
