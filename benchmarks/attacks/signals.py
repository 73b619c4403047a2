"""Signals to a run; `benchmarks/kill.py` and `disk_faults.py` make many more of them."""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import disk_faults, kill
from benchmarks.attacks.table import Row, row


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        campaign = kill.Campaign(Path(folder))
        yield _sigkill(campaign, 8)
        yield _in_the_loop(campaign, 5)
        yield _twice(campaign)
        yield _before_the_loop(campaign, 15)
        yield _disk(campaign.folder)


def _finished(campaign: kill.Campaign) -> str | None:
    """Let the killed run end; None if it is then what the undisturbed one is."""
    campaign.finish(campaign.killed)
    equal = kill.same(campaign.quiet, campaign.killed)
    shutil.rmtree(campaign.killed)
    return None if equal else "other rows or weights"


def _sigkill(campaign: kill.Campaign, tries: int) -> Row:
    for _ in range(tries):
        campaign.kill(signal.SIGKILL)
    wrong = _finished(campaign)
    return row(
        "SIGKILL at random moments of one run",
        [wrong] * tries,
        "rows and weights as undisturbed",
    )


def _send(
    campaign: kill.Campaign, when: Callable[[str], bool], *numbers: int
) -> tuple[int, str]:
    """Start the run and send these once its output is so: (exit code, output)."""
    path = campaign.folder / "log"
    with path.open("wb") as log:
        process = kill.start(campaign.folder, campaign.killed, log)
        while not when(path.read_text()) and process.poll() is None:
            time.sleep(0.01)
        for number in numbers:
            time.sleep(campaign.chance.uniform(0, 0.3))
            process.send_signal(number)
        begin = time.monotonic()
        process.wait(120)
    told = path.read_text()
    if time.monotonic() - begin > 60:
        told += "Traceback: it took more than a minute"
    return process.returncode, told


def _in_the_loop(campaign: kill.Campaign, tries: int) -> Row:
    outcomes = []
    for number in range(tries):
        sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
        code, told = _send(campaign, lambda told: "compiling the rollout" in told, sent)
        right = code == 128 + sent and "Traceback" not in told
        outcomes.append(_finished(campaign) if right else f"exit code {code}")
    return row(
        "SIGTERM, SIGINT in the loop",
        outcomes,
        "saved, exit code 143 or 130; rows and weights as undisturbed",
    )


def _twice(campaign: kill.Campaign) -> Row:
    twice = (signal.SIGTERM, signal.SIGTERM)
    code, told = _send(campaign, lambda told: "compiling the rollout" in told, *twice)
    right = code == 143 and "Traceback" not in told
    return row(
        "SIGTERM twice",
        [_finished(campaign) if right else f"exit code {code}"],
        "ended by the second; the same command went on",
    )


def _before_the_loop(campaign: kill.Campaign, tries: int) -> Row:
    """After what it says of itself, from the first line to the last before it trains."""
    words = ("loading", "plan", "memory of", "evaluating")
    outcomes = []
    for number in range(tries):
        word = words[number % len(words)]
        code, told = _send(
            campaign, lambda told, word=word: word in told, signal.SIGINT
        )
        right = code == 130 and "Traceback" not in told
        outcomes.append(None if right else f"after '{word}': exit code {code}")
    shutil.rmtree(campaign.killed, ignore_errors=True)
    return row("SIGINT before the loop", outcomes, "ended, exit code 130, no traceback")


def _disk(folder: Path) -> Row:
    cases = (
        ("checkpoint", "disk full"),
        ("checkpoint", "no permission"),
        ("samples", "no permission"),
        ("metrics", "removed"),
    )
    outcomes = []
    for place, fault in cases:
        told = disk_faults.cell(folder, place, fault)
        right = told.endswith("| yes |") and "exit code" not in told
        outcomes.append(None if right else told.replace("|", " "))
    return row(
        "disk full, no permission, removed, in checkpoints, samples and metrics",
        outcomes,
        "one line; went on with equal rows once mended",
    )
