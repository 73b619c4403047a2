"""The pool of this machine, with a fake main that is done at once."""

import os
import signal
import subprocess
import sys

import pytest

from flowgrpo_jax.errors import UserError
from launch import command, hyper, local, slots, states, sweep_dir, table, unit
from tests.launch import fakes
from tests.launch.test_unit import wait_for

TWO = [slots.Slot("a", {"SLOT": "a"}), slots.Slot("b", {"SLOT": "b"})]
LAUNCHER = """
import os, sys
from launch import local, slots, sweep_dir
os.environ["PYTHONPATH"] = sys.argv[2]  # the fake main is for the units alone
pool = local.Pool(sweep_dir.read(sys.argv[1]), [slots.Slot("a", {})], 0, 0.0)
pool.run()
print("stopped", pool.stopped)
"""


@pytest.fixture(autouse=True)
def fake_main(tmp_path, monkeypatch):
    fakes.install(tmp_path, monkeypatch)


def most_at_once(events):
    running = most = 0
    for event in events:
        running += 1 if event.startswith("start") else -1
        most = max(most, running)
    return most


def test_units_share_slots_and_finished_ones_are_not_run_again(tmp_path, capfd):
    """Oracle: events of the fake main; never more at once than slots, each unit once."""
    points = hyper.product(
        [hyper.sweep("config.seed", [1, 2, 3, 4]), hyper.fixed("seconds", 0.3)]
    )
    sweep = fakes.sweep(tmp_path, points)
    for _ in range(2):
        local.Pool(sweep, TWO, retries=0, backoff=0.0).run()
    events = fakes.events(tmp_path)
    assert sorted(events) == sorted(
        f"{word} {n}-seed={n}" for n in (1, 2, 3, 4) for word in ("start", "end")
    )
    assert most_at_once(events) == 2
    told = capfd.readouterr().err.splitlines()
    assert "4 of them are finished" in told and "\033" not in "".join(told)
    assert {one.word for one in states.of(sweep)} == {"finished"}
    assert not table.tell(sweep)


def test_a_killed_unit_starts_again_and_a_refused_one_does_not(tmp_path, capfd):
    """Oracle: starts in the records; the others finish, last lines are in the table."""
    acts = hyper.sweep("act", ["die once", "refuse", "die", "finish"])
    sweep = fakes.sweep(tmp_path, acts)
    local.Pool(sweep, TWO, retries=1, backoff=0.01).run()
    assert [one.word for one in states.of(sweep)] == [
        "finished",
        "failed",
        "killed",
        "finished",
    ]
    starts = [unit.read(sweep.workdir(one))["starts"] for one in sweep.units]
    assert starts == [2, 1, 2, 1]
    assert table.tell(sweep)  # not all are finished
    told, errors = capfd.readouterr()
    assert "error: seed: -1: must be at least 0" in told and "about to die" in told
    assert "killed by signal 9, started again in 0 s (1 of 1)" in errors


def launched(sweep):
    path = {"PYTHONPATH": str(local.command.REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(sweep.path), os.environ["PYTHONPATH"]],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | path,
    )


def test_a_signal_reaches_the_units_and_no_other_starts(tmp_path):
    """Oracle: events of the fake main; the launcher waits until its unit has saved."""
    sweep = fakes.sweep(tmp_path, hyper.sweep("act", ["wait", "finish"]))
    launcher = launched(sweep)
    wait_for(lambda: fakes.events(tmp_path))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=60)[0] == f"stopped {signal.SIGTERM:d}\n"
    assert [event.split()[0] for event in fakes.events(tmp_path)] == ["start", "saved"]
    assert [one.word for one in states.of(sweep)] == ["stopped", "waiting"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_launcher_takes_its_units_along(tmp_path):
    """Oracle: events of the fake main; the next launcher goes on, once they have saved."""
    sweep = fakes.sweep(tmp_path, hyper.sweep("act", ["finish", "wait"]))
    launcher = launched(sweep)
    wait_for(lambda: len(fakes.events(tmp_path)) == 3)
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: len(fakes.events(tmp_path)) == 4)  # else it may end by itself
    (tmp_path / "gate").touch()
    local.Pool(sweep_dir.read(sweep.path), TWO, 0, 0.0).run()
    words = [event.split()[0] for event in fakes.events(tmp_path)]
    assert words == ["start", "end", "start", "saved", "start", "end"]
    assert {one.word for one in states.of(sweep)} == {"finished"}


DEVICES = [
    (["0", "1"], 2, [{unit.CPUS: "0"}, {unit.CPUS: "1"}], "CPU cores"),
    (["0", "1", "2"], 1, [{"CUDA_VISIBLE_DEVICES": "0,1,2"}], "GPUs"),
    (
        ["4", "5"],
        2,
        [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}],
        "GPUs",
    ),
]


@pytest.mark.parametrize("devices, count, variables, kind", DEVICES)
def test_device_sets(monkeypatch, devices, count, variables, kind):
    """Oracle: by hand; as many devices in each set, none in two."""
    monkeypatch.setattr(slots, "_devices", lambda: (kind, devices))
    assert [slot.variables for slot in slots.of_this_machine(count)] == variables


def test_chips_of_a_tpu_vm(monkeypatch, tmp_path):
    """Oracle: libtpu's variables for two chips a process, by hand; one port each."""
    for number in range(4):
        (tmp_path / f"accel{number}").touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert slots._tpu_chips(tmp_path) == ["0", "1", "2", "3"]
    monkeypatch.setattr(slots, "_devices", lambda: ("TPU chips", ["0", "1", "2", "3"]))
    first, second = (slot.variables for slot in slots.of_this_machine(2))
    assert first["TPU_VISIBLE_CHIPS"] == "0,1" and second["TPU_VISIBLE_CHIPS"] == "2,3"
    assert first["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    assert first["TPU_MESH_CONTROLLER_PORT"] != second["TPU_MESH_CONTROLLER_PORT"]
    with pytest.raises(
        UserError, match="--max_parallel: 5: this machine has 4 TPU chips"
    ):
        slots.of_this_machine(5)


def test_a_launcher_sets_nothing_up_for_its_units():
    """Oracle: the variables it began with; flags for its cores would be the units', too."""
    program = """
import os
before = dict(os.environ)
from absl import flags
from launch import command
def main(extra):
    changed = {key for key in os.environ if before.get(key) != os.environ[key]}
    print(sorted(changed))
command.run(main, flags.FlagValues())
"""
    variables = {
        k: v for k, v in os.environ.items() if not k.startswith(("XLA", "TF_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        cwd=command.REPOSITORY,
    )
    assert done.stdout.splitlines() == ["['TF_CPP_MIN_LOG_LEVEL']"], done.stderr
