"""One unit: its log and record, signals, and the end of whoever started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import unit
from tests.launch import fakes


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start `python -m launch.unit` with these flags; (process, workdir)."""
    fakes.install(tmp_path, monkeypatch)
    from launch.command import REPOSITORY

    path = os.pathsep.join([os.environ["PYTHONPATH"], str(REPOSITORY)])
    started = []

    def started_with(*flags, **variables):
        workdir = tmp_path / "my unit"
        words = [f"--events={tmp_path / 'events.txt'}", f"--gate={tmp_path / 'gate'}"]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "launch.unit",
                *words,
                *flags,
                f"--workdir={workdir}",
            ],
            env=os.environ | variables | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process, workdir

    yield started_with
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=60):
    """Wait until it holds; the time is a limit, not what is tested."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_unit_leaves_a_log_and_a_record(start):
    """Oracle: what the fake main prints and returns; the line that runs it by hand."""
    process, workdir = start("--act=refuse", CUDA_VISIBLE_DEVICES="1")
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and told == "error: seed: -1: must be at least 0\n"
    first, second = (workdir / "log.txt").read_text().splitlines()
    assert first.startswith("$ env CUDA_VISIBLE_DEVICES=1 ") and second == told.strip()
    assert first.endswith(f"'--workdir={workdir}'") and "-m flowgrpo_jax.main" in first
    record = unit.read(workdir)
    assert (record["code"], record["starts"]) == (2, 1) and not unit.is_running(workdir)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2"])
def test_a_signal_is_passed_on(start, tmp_path, number):
    """Oracle: the fake main's own exit code and event; USR2 is what submitit sends."""
    process, workdir = start("--act=wait")
    wait_for(lambda: fakes.events(tmp_path))
    assert unit.is_running(workdir)
    process.send_signal(getattr(signal, number))
    process.communicate(timeout=60)
    assert process.returncode == 143 and unit.read(workdir)["code"] == 143
    assert fakes.events(tmp_path)[-1] == "saved my unit"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_unit_that_is_killed_takes_its_run_along_and_the_next_one_waits(
    start, tmp_path
):
    """Oracle: the order of events: the second starts after the first has saved."""
    process, workdir = start("--act=wait")
    wait_for(lambda: "child" in (unit.read(workdir) or {}) and fakes.events(tmp_path))
    process.kill()
    second, _ = start()  # it waits for no gate
    second.communicate(timeout=60)
    events = [line.split()[0] for line in fakes.events(tmp_path)]
    assert events == ["start", "saved", "start", "end"]
    assert unit.read(workdir)["starts"] == 2 and second.returncode == 0


def test_a_number_that_another_process_has_is_no_unit(tmp_path):
    """Oracle: a process that works on no unit; a host that fell silent."""
    record = {"pid": os.getppid(), "host": unit.socket.gethostname()}
    (tmp_path / "unit.json").write_text(json.dumps(record))
    assert not unit.is_running(tmp_path)
    (tmp_path / "unit.json").write_text(json.dumps(record | {"host": "elsewhere"}))
    assert unit.is_running(tmp_path)
    os.utime(tmp_path / "unit.json", (0, 0))
    assert not unit.is_running(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_new_container_may_count_from_the_same_number(tmp_path):
    """Oracle: this very process, whose command line has the name of the workdir."""
    program = Path("/proc/self/cmdline").read_text().split("\0")[0]
    workdir = tmp_path / Path(program).name
    workdir.mkdir()
    record = {"pid": os.getpid(), "host": unit.socket.gethostname()}
    (workdir / "unit.json").write_text(json.dumps(record))
    assert not unit.is_running(workdir)


@pytest.mark.parametrize("name", unit._PROCESSES)
def test_a_cluster_tells_which_process_this_is(monkeypatch, name):
    """Oracle: the variables' names, by hand."""
    assert unit.process() == 0
    monkeypatch.setenv(name, "3")
    assert unit.process() == 3


def test_log_and_record_are_of_the_first_process(start, tmp_path):
    """Oracle: what the fake main prints, twice; a signal reaches each of the two."""
    first, workdir = start("--act=wait", SLURM_PROCID="0")
    wait_for(lambda: "child" in (unit.read(workdir) or {}) and fakes.events(tmp_path))
    second, _ = start("--act=wait", SLURM_PROCID="1")
    wait_for(lambda: len(fakes.events(tmp_path)) == 2)
    told = []
    for process in (second, first):
        process.send_signal(signal.SIGTERM)
        told.append(process.communicate(timeout=60)[0])
        assert process.returncode == 143
    assert told == ["SIGTERM: saving, then stopping\n"] * 2
    assert (workdir / "log.txt").read_text().count("SIGTERM: saving") == 1
    record = unit.read(workdir)
    assert (record["pid"], record["starts"], record["code"]) == (first.pid, 1, 143)
