"""Kill a run at random moments, start it again each time, compare with a quiet one.

    python -m benchmarks.kill --folder=DIR            # 100 SIGKILL, 50 SIGTERM, 50 SIGINT
    python -m benchmarks.kill --folder=DIR --sigkill=5 --sigterm=0 --sigint=0

A tiny run of the embedded model, from the first import to the report. A kill comes
after a random share of the processor's seconds that the undisturbed run took, so it can
fall everywhere, however busy the machine is. A run is killed a few times, then it may
finish: metrics.jsonl without its time fields and the weights must be the undisturbed
run's. A signal must end the process: exit code 143 or 130, no traceback; or the
run's own end came first. What is done is kept in DIR, and the same command goes on.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from benchmarks import sections
from flowgrpo_jax.runtime import metric_names

IN_A_ROW = 5  # kills of one run before it may finish
TITLE = "Killed at random moments"
OVERRIDES = [
    "--config.num_iterations=4",
    "--config.prompts_per_iteration=2",
    "--config.group_size=4",
    "--config.microbatch=4",
    "--config.updates_per_iteration=1",
    "--config.train.decay_iterations=0",
    "--config.sample.num_steps=3",
    "--config.sample.sde_window_range=(0,2)",
    "--config.sample.guidance_scale=1.0",
    "--config.sample.eval_num_steps=2",
    "--config.eval.guidance_scale=1.0",
    "--config.eval.every=2",
    "--config.eval.images_per_task=1",
    "--config.eval.final_images_per_task=1",
    "--config.checkpoint.every=1",
]
PROMPTS = [
    {"prompt": f"a {color} {name}", "tag": "single_object"}
    | {"include": [{"class": name, "count": 1, "color": color}]}
    for color, name in (("red", "circle"), ("blue", "square"))
]
# What a process said last -> where the kill has found it.
PHASES = {
    "loading": "set-up",
    "plan:": "set-up",
    "iteration:": "set-up",
    "memory of": "set-up",
    "evaluating": "evaluation",
    "compiling": "first step",
    "iteration 4\n": "end, report",
    "iteration": "steps",
    "accuracy": "end, report",
}


def start(
    folder: Path,
    workdir: Path,
    log: IO[bytes],
    more: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """The tiny run; prompts and compiled programs are kept in `folder`."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "flowgrpo_jax.main"),
            *("--config=configs/geneval.py", f"--workdir={workdir}", *words(folder)),
            *more,
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ
        | {"HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu"}
        | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        | environment,
    )


def words(folder: Path) -> list[str]:
    """The flags of the tiny run; its prompts are written into `folder`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    return [
        *OVERRIDES,
        f"--config.prompts={prompts}",
        f"--config.eval.prompts={prompts}",
    ]


class Campaign:
    """A folder with the undisturbed run, the compiled programs and what was done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.quiet, self.killed = folder / "quiet", folder / "killed"
        self._file = folder / "kills.json"
        self.chance = random.Random()
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, Any] = {"seconds": 0.0, "kills": [], "runs": []}
        if self._file.exists():
            self.done = json.loads(self._file.read_text())
        else:
            self._undisturbed()

    def keep(self) -> None:
        self._file.write_text(json.dumps(self.done))

    def finish(self, workdir: Path) -> float:
        """Let a run end; the processor's seconds that it took."""
        with (self.folder / "log").open("wb") as log:
            process = start(self.folder, workdir, log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        told = (self.folder / "log").read_text()
        assert process.returncode == 0, told
        return usage.ru_utime + usage.ru_stime

    def _undisturbed(self) -> None:
        """Twice: the second one takes its compiled programs from the folder, as all do."""
        self.finish(self.quiet)
        again = self.folder / "again"
        self.done["seconds"] = self.finish(again)
        assert same(self.quiet, again), "two undisturbed runs differ"
        shutil.rmtree(again)
        self.keep()

    def kill(self, number: signal.Signals) -> bool:
        """One start of the run, and its kill; False if it ended before."""
        share = self.chance.random()
        path = self.folder / "log"
        with path.open("wb") as log:
            process = start(self.folder, self.killed, log)
            while cpu_seconds(process) < share * self.done["seconds"]:
                if process.poll() is not None:
                    assert process.returncode == 0, path.read_text()
                    return False
                time.sleep(0.01)
            time.sleep(self.chance.uniform(0, 0.05))
            before = path.read_text()
            sent = time.monotonic()
            process.send_signal(number)
            process.wait()
        told = path.read_text()
        self.done["kills"].append(
            {
                "signal": number.name,
                "phase": phase(before),
                "seconds": time.monotonic() - sent,
                "right": process.returncode in allowed(number, before, told)
                and ("Traceback" not in told or process.returncode == 1),
                "code": process.returncode,
                "told": told[-2000:],
            }
        )
        self.keep()
        return True


def allowed(number: signal.Signals, before: str, told: str) -> tuple[int, ...]:
    """Exit codes: the signal's; 0 where the run's own end came first."""
    if number == signal.SIGKILL:
        return (-number, 0)
    codes: tuple[int, ...] = (128 + number,)
    if not before and "flowgrpo_jax" not in told:  # Python itself was still starting
        codes += (-number, 1)  # and says so of a SIGINT, before it has read our name
    # After its last line Python has put the kernel's own handlers back.
    return (*codes, 0, -number) if "report: " in told else codes


def cpu_seconds(process: subprocess.Popen) -> float:
    """User and system time of a process, 0 once it is gone."""
    try:
        fields = (
            Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        )
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def phase(told: str, phases: Mapping[str, str] = PHASES) -> str:
    for line in reversed(told.splitlines(keepends=True)):
        for begin, name in phases.items():
            if line.startswith(begin):
                return name
    return "imports"


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not metric_names.is_time(k)}
        for line in lines
    ]


def same(one: Path, other: Path) -> bool:
    """Rows and weights."""
    name = "weights.safetensors"
    return rows(one) == rows(other) and (
        (one / name).read_bytes() == (other / name).read_bytes()
    )


def table(done: dict[str, Any]) -> str:
    """What became of the kills, by signal, and of the runs."""
    names = ["imports", *dict.fromkeys(PHASES.values())]
    lines = [
        "| signal | kills | " + " | ".join(names) + " | right | slowest end, s |",
        "|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        kills = [kill for kill in done["kills"] if kill["signal"] == name]
        found = Counter(kill["phase"] for kill in kills)
        slowest = max((kill["seconds"] for kill in kills), default=0.0)
        right = sum(kill["right"] for kill in kills)
        cells = [name, len(kills), *(found[p] for p in names), right, f"{slowest:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    equal = sum(run["equal"] for run in done["runs"])
    killed = sum(run["kills"] for run in done["runs"] if run["equal"])
    lines += [
        "",
        f"{len(done['runs'])} runs were killed up to {IN_A_ROW} times each and then "
        f"finished: rows and weights of {equal} of them, with {killed} of "
        f"{sum(run['kills'] for run in done['runs'])} kills, are the undisturbed run's. "
        f"The undisturbed run takes {done['seconds']:.0f} s of processor time.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sigkill", type=int, default=100)
    parser.add_argument("--sigterm", type=int, default=50)
    parser.add_argument("--sigint", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="to docs/reliability.md")
    chosen = parser.parse_args()
    campaign = Campaign(chosen.folder.absolute())
    done = campaign.done
    wanted = {
        signal.SIGKILL: chosen.sigkill,
        signal.SIGTERM: chosen.sigterm,
        signal.SIGINT: chosen.sigint,
    }
    while True:
        counted = Counter(kill["signal"] for kill in done["kills"])
        left = [
            n for n, count in wanted.items() for _ in range(count - counted[n.name])
        ]
        if not left:
            break
        shutil.rmtree(campaign.killed, ignore_errors=True)
        kills = 0
        for number in campaign.chance.sample(left, min(IN_A_ROW, len(left))):
            if not campaign.kill(number):
                break
            kills += 1
        campaign.finish(campaign.killed)
        equal = same(campaign.quiet, campaign.killed)
        done["runs"].append({"kills": kills, "equal": equal})
        campaign.keep()
        print(f"{len(done['kills'])} kills, {len(done['runs'])} runs", flush=True)
    text = table(done)
    print(text)
    bad = [kill for kill in done["kills"] if not kill["right"]]
    for kill in bad:
        print(
            f"--- {kill['signal']} in {kill['phase']}: {kill['code']}\n{kill['told']}"
        )
    if chosen.write:
        sections.write(TITLE, "python -m benchmarks.kill --folder=DIR --write", text)
    return 1 if bad or not all(run["equal"] for run in done["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
