"""Runs a sweep on this machine: a pool of processes, one for each set of devices.

python -m launch.local --config=configs/geneval.py --sweep=launch/sweeps/seeds.py \\
  --max_parallel=2 -- --config.num_iterations=100

What stands behind ` -- ` goes to every unit. The same command goes on where it was
stopped: finished units are not run again. Ctrl-C and SIGTERM are handed on, and the units
save before they end; once more, and they end at once. A unit that a signal killed (out of
memory, say) is started again, one that was told what is wrong with its input is not.
"""

import os
import signal
import subprocess
import sys
import time

from absl import flags

from launch import command, slots, states, table
from launch.live import Live
from launch.sweep_dir import SweepDir
from launch.unit import LAUNCHER
from launch.units import Unit

FLAGS = flags.FlagValues()
_OPTIONS = command.define(FLAGS)
_PARALLEL = flags.DEFINE_integer(
    "max_parallel",
    1,
    "Units at once: each gets as many of the GPUs, TPU chips or CPU cores.",
    lower_bound=1,
    flag_values=FLAGS,
)
_RETRIES = flags.DEFINE_integer(
    "retries", 3, "Starts again of a unit that a signal killed.", 0, flag_values=FLAGS
)
_BACKOFF = flags.DEFINE_float(
    "backoff",
    10.0,
    "Seconds before the first of them; twice as many before the next.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TURN = 0.2  # seconds between two looks at the processes


class Pool:
    """Runs units, each in a slot, until none is left or a signal stops them."""

    def __init__(
        self, sweep: SweepDir, devices: list[slots.Slot], retries: int, backoff: float
    ):
        self._sweep = sweep
        self._free = list(devices)
        self._retries, self._backoff = retries, backoff
        self._running: dict[int, tuple[Unit, slots.Slot, subprocess.Popen]] = {}
        self._starts: dict[int, int] = {}
        self._live = Live(sweep)
        self.stopped = 0  # the last signal

    def run(self) -> None:
        """Start all units that are not finished, and wait for them."""
        todo = [one.unit for one in states.of(self._sweep) if not one.is_done]
        if done := len(self._sweep.units) - len(todo):
            self._live.message(f"{done} of them are finished")
        waiting = [(0.0, unit) for unit in todo]
        before = [signal.signal(n, self._hand_on) for n in _SIGNALS]
        while self._running or (waiting and not self.stopped):
            now = time.monotonic()
            due = [entry for entry in waiting if entry[0] <= now]
            while self._free and due and not self.stopped:
                waiting.remove(due[0])
                self._start(due.pop(0)[1])
            waiting += [(now + delay, unit) for delay, unit in self._ended()]
            self._live.show()
            time.sleep(_TURN)
        self._live.show(at_once=True)
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)

    def _start(self, unit: Unit) -> None:
        slot = self._free.pop(0)
        self._starts[unit.wid] = self._starts.get(unit.wid, 0) + 1
        places = [os.environ.get("PYTHONPATH"), str(command.REPOSITORY)]
        path = os.pathsep.join(filter(None, places))
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.unit", *self._sweep.words(unit)],
            env=os.environ
            | slot.variables
            | {"PYTHONPATH": path, LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the unit has a log
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for this process, which hands it on
        )
        self._running[unit.wid] = unit, slot, process

    def _ended(self) -> list[tuple[float, Unit]]:
        """Free the slots of units that ended: (seconds to wait, unit) to start again."""
        again = []
        for wid, (unit, slot, process) in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            del self._running[wid]
            self._free.append(slot)
            starts, killed = self._starts[wid], code < 0 or code > 128
            if killed and not self.stopped and starts <= self._retries:
                delay = self._backoff * 2 ** (starts - 1)
                again.append((delay, unit))
                self._live.message(
                    f"unit {unit.name}: killed by signal {code % 128 if code > 0 else -code}"
                    f", started again in {delay:.0f} s ({starts} of {self._retries})"
                )
        return again

    def _hand_on(self, number: int, frame: object) -> None:
        del frame
        self.stopped = number
        for _, _, process in self._running.values():
            process.send_signal(number)


def main(extra: list[str]) -> int:
    devices = slots.of_this_machine(_PARALLEL.value)
    sweep = command.prepared(_OPTIONS, extra)
    pool = Pool(sweep, devices, _RETRIES.value, _BACKOFF.value)
    pool.run()
    unfinished = table.tell(sweep)
    return 128 + pool.stopped if pool.stopped else int(unfinished)


if __name__ == "__main__":
    command.run(main, FLAGS)
