"""Several processes of this machine as the hosts of a run: agreement, and ends."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import cluster

BEGIN = """
import os, signal, sys, time
from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import cluster, stopping
cluster._PATIENCE, cluster.JOINING = 6.0, {joining}
def main():
    address = cluster.given("127.0.0.1:{port}", {count}, {index})
    with cluster.joined(address):
        run()
        print("done", flush=True)
    return 0
stopping.install()
"""
END = """
from absl import flags
sys.argv = ["test"]
cli.run(main, flags.FlagValues())
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(body, count=2, joining=40, absent=(), port=None):
    """`body`, the lines of `run()`, in so many processes; returns them."""
    port = port or free_port()
    lines = "def run():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                BEGIN.format(port=port, count=count, index=index, joining=joining)
                + lines
                + END,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
        )
        for index in range(count)
        if index not in absent
    ]


def ended(processes):
    """(exit code, stdout, lines of errors) of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        found.append((process.returncode, out, errors))
    return found


def test_what_one_tells_all_know():
    """Oracle: the values themselves, of numpy's types too, in the order of processes."""
    body = """
    import numpy as np
    me = cluster.index()
    told = cluster.together(lambda: {"k": me, "x": np.arange(3, dtype=np.float64) + me})
    assert [one["k"] for one in told] == [0, 1]
    assert [one["x"].tolist() for one in told] == [[0, 1, 2], [1, 2, 3]]
    assert told[1]["x"].dtype == np.float64
    assert cluster.first(lambda: f"of {me}") == "of 0"
    assert (cluster.count(), cluster.is_first()) == (2, me == 0)
    for turn in range(20):
        assert cluster.together(lambda: turn * 10 + me) == [turn * 10, turn * 10 + 1]

    def fails():
        if me == 1:
            raise UserError("key: 1: wrong")
        return 0

    try:
        cluster.together(fails)
    except UserError as error:
        print(error)
    try:
        cluster.together(lambda: (_ for _ in ()).throw(stopping.Stopped()) if me else 0)
    except stopping.Stopped:
        print("stopped")
    cluster.same({"config": {"a": {"b": 1}}})
    cluster.same({"config": {"a": {"b": 1 + me}}})
    """
    for index, (code, out, errors) in enumerate(ended(start(body))):
        assert code == 2
        line, stopped = out.splitlines()
        assert line.startswith("key: 1: wrong")
        assert ("process 1 on" in line) == (index == 0)
        assert stopped == "stopped"
        [error] = errors
        assert error.startswith("error: config.a.b: 2 on process 1 on ")
        assert ", 1 on process 0 on " in error


@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_when_one_is_killed(victim):
    """The others end with a line that names it; those of process 0 by JAX's own abort."""
    body = f"""
    if cluster.index() == {victim}:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    cluster.together(lambda: 0)
    """
    found = ended(start(body, count=3))
    for index, (code, out, errors) in enumerate(found):
        if index == victim:
            assert code == -signal.SIGKILL
        else:
            assert code == 143 and "done" not in out
            [line] = errors
            assert line.startswith(f"error: process {victim} on ")
            assert "is gone" in line


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_ends_all(who):
    """Its line, with its name, and its exit code; a signal ends all of them too."""
    error = f"""
    if cluster.index() == {who}:
        raise UserError("key: 1: wrong")
    cluster.together(lambda: 0)
    """
    for index, (code, _, errors) in enumerate(ended(start(error))):
        assert code == 2
        assert errors[0].endswith("key: 1: wrong")
        assert ("has ended" in errors[0]) == (index != who)
    asked = f"""
    if cluster.index() == {who}:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    cluster.together(lambda: 0)
    """
    for index, (code, _, errors) in enumerate(ended(start(asked))):
        assert code == 143
        assert (index == who) or errors[0].endswith("has ended: SIGTERM: stopped")


def test_a_fault_on_all_of_them_is_told_as_it_is():
    """A traceback on both, at once: nobody waits for news of the other."""
    body = """
    print(1 / 0)
    """
    for process in start(body):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 1 and "ZeroDivisionError" in err


def test_one_that_does_not_come_is_told():
    for index, (code, _, [line]) in enumerate(
        ended(start("pass", joining=3, absent=[1]))
    ):
        assert code == 2
        assert "not all of 2 processes came there within 3 s" in line
        assert f"process {index} on" in line


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, _, [line])] = ended(start("pass", absent=[1], port=port, joining=3))
    assert code == 2 and f"port {port} is taken on " in line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("host:1", None, 0), "--num_processes: missing"),
        ((None, 2, 0), "--coordinator: missing"),
        (("host", 2, 0), "--coordinator: host: must be HOST:PORT"),
        (("host:0", 2, 0), "--coordinator: host:0: must be HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "--process_id: 2: must be 0 to 1"),
        (("no.such.name.invalid:1", 2, 0), "no.such.name.invalid: the name does not"),
    ],
)
def test_wrong_flags_are_one_line(flags, line):
    with pytest.raises(UserError, match=f"^(--coordinator: )?{line}"):
        cluster.given(*flags)


def test_one_process_joins_nothing(monkeypatch):
    """Neither with flags, nor as the one task that SLURM may start."""
    assert cluster.given(None, None, None) is None
    assert cluster.given("127.0.0.1:1", 1, 0) is None
    alone = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    assert cluster.given(None, None, None) is None
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    found = cluster.given(None, None, None)
    assert found is not None
    assert (found.count, found.index) == (2, 1)
    assert found.coordinator.startswith("localhost:")
    assert cluster.together(lambda: 3) == [3]  # and a plain call it is


@pytest.mark.parametrize(
    ("tasks", "nodes", "devices"), [("2", "2", None), ("4", "2", [1]), ("1", "1", None)]
)
def test_a_task_alone_on_its_node_has_all_devices(monkeypatch, tasks, nodes, devices):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert cluster._own_devices() == devices


class Gone:
    """The store of a process 0 that is no more: every call raises `error`."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def call(*words, **more):
            raise self.error

        return call


@pytest.mark.parametrize("error", [RuntimeError("UNAVAILABLE"), ValueError("UNKNOWN")])
def test_a_store_that_is_gone_ends_a_process_after_an_error(monkeypatch, error):
    """Oracle: by hand; jaxlib raises both kinds, and neither may end the watch."""
    told, ended_by = [], threading.Event()

    def leave(status, line):
        told.append((status, line))
        ended_by.set()
        raise SystemExit  # the thread: the real one does not return

    monkeypatch.setattr(cluster.stopping, "leave", leave)
    monkeypatch.setattr(cluster, "_BEAT", 0.01)
    one = cluster._Cluster(Gone(error), index=1, count=2)
    one._watching.start()
    one.wait_for_news()  # as after a collective that has failed
    assert ended_by.wait(10)
    [(status, line)] = told
    assert status == 143
    assert "process 0 is gone" in line
