"""What the processes beside the first one print: `logs/process_K.log` in the workdir.

The first one has the terminal; errors that end a run are printed by each of them.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import IO

from flowgrpo_jax.runtime import cluster
from flowgrpo_jax.runtime.workdir import user_errors


class ProcessLog:
    """Within it nothing but the first process prints; `to` says where the rest goes."""

    def __init__(self) -> None:
        self._held: IO[str] = io.StringIO()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ProcessLog":
        if not cluster.is_first():
            self._stack.enter_context(contextlib.redirect_stdout(self._held))
        return self

    def to(self, workdir: Path) -> None:
        """From here on into the log, with what was printed before."""
        if cluster.is_first():
            return
        path = workdir / "logs" / f"process_{cluster.index()}.log"
        with user_errors(path):
            path.parent.mkdir(exist_ok=True)
            file = self._stack.enter_context(path.open("a", buffering=1))
        assert isinstance(self._held, io.StringIO)
        file.write(self._held.getvalue())
        self._stack.enter_context(contextlib.redirect_stdout(file))
        self._stack.enter_context(contextlib.redirect_stderr(file))

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if sys.stdout is not None:
            sys.stdout.flush()
