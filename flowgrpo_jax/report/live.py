"""The page of a run that goes on: written at evaluations, and now and then between.

It stands beside TensorBoard and wandb as one more board of `runtime/metrics.py`.
"""

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo_jax.report import page
from flowgrpo_jax.runtime.workdir import atomic_write

_SHARE = 0.01  # of the time of a run that may go into its page
_PAUSE = 30.0  # seconds between two pages at least


class LivePage:
    """Writes report.html while a run goes on.

    Whatever fails in it is told once and ends no run: the page is a view, and the last
    one, after the run, tells its errors as any command does.
    """

    def __init__(self, workdir: Path, command: str):
        atomic_write(workdir / "report.json", json.dumps({"command": command}))
        self._workdir = workdir
        self._due = 0.0
        self._told = False

    def write_scalars(self, iteration: int, scalars: Mapping[str, Any]) -> None:
        """After a row: a page, if the last one is old enough. The first is that of the
        first evaluation."""
        del iteration, scalars
        if self._due and time.monotonic() >= self._due:
            self._write()

    def write_images(
        self, iteration: int, images: Mapping[str, Any], captions: Sequence[str] = ()
    ) -> None:
        """After an evaluation, whose row and pictures are there: a page."""
        del iteration, images, captions
        self._write()

    def flush(self) -> None:
        """Does nothing: a page is whole once it is written."""

    def close(self) -> None:
        """Does nothing."""

    def _write(self) -> None:
        begin = time.monotonic()
        try:
            page.write_report(self._workdir)
        except Exception:
            if not self._told:
                print(
                    f"warning: {page.FILE} cannot be written; the run goes on",
                    traceback.format_exc(),
                    sep="\n",
                    file=sys.stderr,
                )
            self._told = True
        now = time.monotonic()
        self._due = now + max(_PAUSE, (now - begin) / _SHARE)
