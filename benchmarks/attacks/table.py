"""What the attacks share: rows of the table, tiny runs, and what one line means."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import metric_names

HEAD = "| attack | tries | right | what was seen |\n|---|---|---|---|"
# The shipped model, smallest numbers of everything: a run of seconds.
TINY = (
    "--config=configs/geneval.py",
    "--config.num_iterations=6",
    "--config.prompts_per_iteration=2",
    "--config.group_size=4",
    "--config.sample.num_steps=3",
    "--config.sample.sde_window_range=(0,2)",
    "--config.sample.eval_num_steps=2",
    "--config.train.decay_iterations=2",
    "--config.eval.every=3",
    "--config.eval.images_per_task=2",
    "--config.eval.final_images_per_task=2",
    "--config.checkpoint.every=2",
)


@dataclass(frozen=True)
class Row:
    """An attack, how often it was made and how often the answer was right."""

    attack: str
    tries: int
    right: int
    seen: str

    def __str__(self) -> str:
        return f"| {self.attack} | {self.tries} | {self.right} | {self.seen} |"


def row(attack: str, outcomes: Iterable[str | None], seen: str) -> Row:
    """A row from one outcome a try: None where it was right, else what was wrong."""
    wrong = list(outcomes)
    failures = [text for text in wrong if text is not None]
    told = seen if not failures else "; ".join(dict.fromkeys(failures))
    return Row(attack, len(wrong), len(wrong) - len(failures), told)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    told: str  # stderr

    @property
    def wrong(self) -> str | None:
        """None if it refused in one line, else what it did in place of that."""
        lines = [line for line in self.told.splitlines() if line.startswith("error: ")]
        if "Traceback" in self.told:
            return f"a traceback: {self.told.splitlines()[-1][:80]}"
        if self.code != 2 or len(lines) != 1:
            return f"exit code {self.code}, {len(lines)} error lines"
        return None


def command(module: str, *arguments: str, seconds: float = 300) -> Ended:
    """Run `python -m flowgrpo_jax.MODULE` and wait for its end."""
    done = subprocess.run(
        [sys.executable, "-m", f"flowgrpo_jax.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return Ended(done.returncode, done.stderr)


def train(workdir: Path, *arguments: str) -> Ended:
    return command("main", *TINY, f"--workdir={workdir}", *arguments)


def result(workdir: Path) -> tuple[list[dict], bytes]:
    """What a run has made: its rows without the fields of time, and its weights."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [
        {k: v for k, v in json.loads(line).items() if not metric_names.is_time(k)}
        for line in lines
    ]
    return rows, (workdir / "weights.safetensors").read_bytes()


def one_line(call: Callable[[], object]) -> str | None:
    """None if it raises a UserError that prints as one clean line, else what it did."""
    try:
        given = call()
    except UserError as error:
        bad = [c for c in str(error) if not c.isprintable() and c != "\n"]
        return f"unprintable: {str(error)!r}"[:80] if bad else None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:80]
    return f"accepted: {given!r}"[:80]


def chosen(groups: Sequence[Callable[[], Iterator[Row]]]) -> Iterator[Row]:
    for group in groups:
        yield from group()
