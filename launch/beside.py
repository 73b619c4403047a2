"""A program that runs beside the units of a sweep until they have ended.

python -m launch.beside FILE PROGRAM ...    PROGRAM ends when FILE is there

For launchers that cannot end a job when others have: XManager on one machine starts
all jobs of an experiment and waits for each. Only the standard library is imported.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import unit

_TURN = 0.1  # seconds between two looks at the file
_PATIENCE = 20.0  # seconds that the program has to end, once it is asked to


def run(ended: Path, command: Sequence[str]) -> int:
    """0 once the program was ended with the units; its own exit code if it ended first."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while not ended.exists():
            if (code := child.poll()) is not None:
                return 128 - code if code < 0 else code
            time.sleep(_TURN)
        child.terminate()
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    unit.end_with(os.getppid())
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
