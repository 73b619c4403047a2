"""Kill a run at random moments, start it again each time, compare with a quiet one.

Command: python benchmarks/kill.py --kills=20
Every process is killed with SIGKILL (and one more with SIGTERM) a random time after it
wrote a random number of rows, until enough kills are done; then the run may finish.
metrics.jsonl without its time fields and the final weights must be equal.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

_KILLS = flags.DEFINE_integer("kills", 20, "SIGKILLs before the run may finish.")
_MODEL = flags.DEFINE_string("model", "sprites", "Weights to start from.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_OVERRIDES = [
    "--config.num_iterations=120",
    "--config.prompts_per_iteration=4",
    "--config.group_size=4",
    "--config.eval.every=7",
    "--config.eval.images_per_task=4",
    "--config.eval.final_images_per_task=4",
    "--config.sample.eval_num_steps=4",
    "--config.checkpoint.every=3",
]


def start(workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "flowgrpo_jax.main"),
            *("--config=configs/geneval.py", f"--workdir={workdir}"),
            *(f"--config.model={_MODEL.value}", *_OVERRIDES),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in lines
    ]


def wait_for_progress(process: subprocess.Popen, workdir: Path) -> None:
    """Until the process has written something of its own, or ended."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_mtime if path.exists() else 0.0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime != before:
            return
        time.sleep(0.02)


def main(_):
    chance = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        quiet, killed = Path(folder) / "quiet", Path(folder) / "killed"
        assert start(quiet).wait() == 0, "the undisturbed run failed"
        done = 0
        while done <= _KILLS.value:
            process = start(killed)
            for _ in range(chance.randint(2, 14)):
                wait_for_progress(process, killed)
            time.sleep(chance.uniform(0.0, 0.5))
            if process.poll() is not None:
                break
            number = signal.SIGTERM if done == _KILLS.value else signal.SIGKILL
            process.send_signal(number)
            process.wait()
            done += 1
            print(f"{number.name} {done}: row {rows_seen(killed)}", flush=True)
        assert start(killed).wait() == 0, "the resumed run failed"
        same_rows = rows(quiet) == rows(killed)
        name = "weights.safetensors"
        same_weights = (quiet / name).read_bytes() == (killed / name).read_bytes()
        print(f"{done} kills; rows equal: {same_rows}; weights equal: {same_weights}")
        sys.exit(not (same_rows and same_weights and done > _KILLS.value))


def rows_seen(workdir: Path) -> int:
    return (workdir / "metrics.jsonl").read_bytes().count(b"\n")


if __name__ == "__main__":
    app.run(main)
