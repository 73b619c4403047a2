"""End one process of several at random moments, start all again, compare with a quiet run.

    python -m benchmarks.kill_hosts --folder=DIR      # 20 SIGKILL, 10 SIGTERM, 4 processes

The tiny run of `benchmarks.kill`, as processes of this machine with one device each.
After a SIGKILL every other process must end within 120 s, with one line that says why
and no traceback; after a SIGTERM all end with 143, saved at one iteration (or before the
first one was done). Who is killed before all have met is missed: the others end with 2.
Then the same command goes on to its end: rows and weights are those of a run of one
process with as many devices. What is done is kept in DIR.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import kill, sections

TITLE = "One process of several killed at random moments"
LONGEST = 120  # seconds until all others have ended
PHASES = kill.PHASES | {"[Gloo]": "steps"}


def start(folder: Path, workdir: Path, count: int) -> list[subprocess.Popen]:
    """The tiny run as so many processes; what each of them prints is in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    devices = {"JAX_NUM_CPU_DEVICES": str(4 // count)}
    begun = []
    for index in range(count):
        place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        more = [*place, f"--process_id={index}"] if count > 1 else []
        with (folder / f"log_{index}").open("wb") as log:
            begun.append(kill.start(folder, workdir, log, more, devices))
    return begun


def told(folder: Path, index: int) -> str:
    return (folder / f"log_{index}").read_text(errors="replace")


class Campaign:
    """A folder with the run of one process, the compiled programs and what was done."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.quiet, self.killed = folder / "quiet", folder / "killed"
        self._file = folder / "kills.json"
        self.chance = random.Random()
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, Any] = {"seconds": 0.0, "kills": []}
        if self._file.exists():
            self.done = json.loads(self._file.read_text())
        else:
            self._undisturbed()

    def keep(self) -> None:
        self._file.write_text(json.dumps(self.done))

    def finish(self, workdir: Path, count: int) -> float:
        """Let a run end; the processor's seconds that its first process took."""
        begun = start(self.folder, workdir, count)
        _, status, usage = os.wait4(begun[0].pid, 0)
        begun[0].returncode = os.waitstatus_to_exitcode(status)
        codes = [process.wait() for process in begun]
        assert not any(codes), (codes, *(told(self.folder, k) for k in range(count)))
        return usage.ru_utime + usage.ru_stime

    def _undisturbed(self) -> None:
        """One process; then several, twice, the second time without compiling."""
        self.finish(self.quiet, 1)
        for _ in range(2):
            again = self.folder / "again"
            self.done["seconds"] = self.finish(again, self.count)
            assert kill.same(self.quiet, again), f"{self.count} processes differ"
            shutil.rmtree(again)
        self.keep()

    def kill(self, number: signal.Signals) -> bool:
        """One start, and the end of one process; False if the run ended before."""
        share, victim = self.chance.random(), self.chance.randrange(self.count)
        begun = start(self.folder, self.killed, self.count)
        while kill.cpu_seconds(begun[victim]) < share * self.done["seconds"]:
            if begun[victim].poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(self.chance.uniform(0, 0.05))
        before = told(self.folder, 0)
        if any(process.poll() is not None for process in begun):
            assert not any(process.wait() for process in begun)
            return False
        sent = time.monotonic()
        begun[victim].send_signal(number)
        codes = [process.wait() for process in begun]
        seconds = time.monotonic() - sent
        lines = [told(self.folder, index) for index in range(self.count)]
        self.done["kills"].append(
            {
                "signal": number.name,
                "victim": victim,
                "phase": kill.phase(before, PHASES),
                "seconds": seconds,
                "right": seconds < LONGEST
                and all(
                    _right(number, index == victim, code, text, "report: " in lines[0])
                    for index, (code, text) in enumerate(zip(codes, lines, strict=True))
                ),
                "codes": codes,
                "told": [text[-1500:] for text in lines],
                "steps": sorted(p.name for p in self.killed.glob("checkpoints/[0-9]*")),
            }
        )
        self.keep()
        return True


def _right(
    number: signal.Signals, victim: bool, code: int, text: str, over: bool
) -> bool:
    """Whether a process ended as it should; `over` if the run had reached its report."""
    if over and code == 0:
        return True
    if number == signal.SIGKILL and victim:
        return code == -number
    if "Traceback" in text:
        return False
    if not victim and "came there within" in text:  # killed before all had met
        return code == 2
    says = "stopped" in text or "has ended" in text or "is gone" in text
    return code == 128 + signal.SIGTERM and (says or number == signal.SIGTERM)


def table(done: dict[str, Any]) -> str:
    names = ["imports", *dict.fromkeys(PHASES.values())]
    lines = [
        "| signal | kills | of process 0 | "
        + " | ".join(names)
        + " | right | then equal | slowest end, s |",
        "|---|---|---|" + "---|" * len(names) + "---|---|---|",
    ]
    for name in dict.fromkeys(one["signal"] for one in done["kills"]):
        kills = [one for one in done["kills"] if one["signal"] == name]
        found = Counter(one["phase"] for one in kills)
        cells = [
            *(name, len(kills), sum(not one["victim"] for one in kills)),
            *(found[phase] for phase in names),
            *(sum(one["right"] for one in kills), sum(one["equal"] for one in kills)),
            f"{max(one['seconds'] for one in kills):.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=4, choices=(2, 4))
    parser.add_argument("--sigkill", type=int, default=20)
    parser.add_argument("--sigterm", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="to docs/reliability.md")
    chosen = parser.parse_args()
    campaign = Campaign(chosen.folder.absolute(), chosen.processes)
    done = campaign.done
    wanted = {signal.SIGKILL: chosen.sigkill, signal.SIGTERM: chosen.sigterm}
    for number, count in wanted.items():
        while sum(one["signal"] == number.name for one in done["kills"]) < count:
            shutil.rmtree(campaign.killed, ignore_errors=True)
            if not campaign.kill(number):
                continue
            campaign.finish(campaign.killed, campaign.count)
            done["kills"][-1]["equal"] = kill.same(campaign.quiet, campaign.killed)
            campaign.keep()
            one = done["kills"][-1]
            print({k: v for k, v in one.items() if k != "told"}, flush=True)
    text = table(done)
    print(text)
    bad = [one for one in done["kills"] if not (one["right"] and one["equal"])]
    for one in bad:
        print("---", *one["told"], sep="\n")
    if chosen.write:
        command = "python -m benchmarks.kill_hosts --folder=DIR --write"
        sections.write(TITLE, command, text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
