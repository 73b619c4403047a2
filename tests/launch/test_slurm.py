"""SLURM by submitit: a real cluster of two nodes on this machine, where it is installed."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from absl import logging

from flowgrpo_jax.errors import UserError
from launch import hyper, slurm, states
from tests.launch import fakes
from tests.launch.test_unit import wait_for

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE OverSubscribe=FORCE
"""


def run(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def free_ports():
    """Three neighbouring ports that are free now."""
    for first in range(17000, 20000, 10):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no ports")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two idle nodes; skipped where Debian's slurm-wlm and munge, or root, are not."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root, and apt-get install slurm-wlm munge")
    port = free_ports()
    folder = tmp_path / "cluster"
    for name in ("state", "n0", "n1"):
        (folder / name).mkdir(parents=True)
    text = CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        port=port,
        first=port + 1,
        second=port + 2,
    )
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    for place in ("/run/munge", "/var/log/munge"):
        os.makedirs(place, exist_ok=True)
        shutil.chown(place, "munge", "munge")
    run("runuser", "-u", "munge", "--", "munged")  # one that runs already stays
    for daemon in (["slurmctld"], ["slurmd", "-N", "n0"], ["slurmd", "-N", "n1"]):
        subprocess.run(daemon, check=True)
    wait_for(lambda: run("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle")
    yield
    run("scancel", "--user=root")
    run("scontrol", "shutdown")


@pytest.fixture(autouse=True)
def absl_keeps_to_the_stream_of_the_process(monkeypatch):
    """Importing submitit closes the stream of every logging handler of the process.

    It configures logging by a dictionary. absl's handler then closes whatever stream is
    not the process's own: pytest's, if that was in place when absl was imported.
    """
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", sys.__stderr__)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Four units of the fake main, the first of which waits for a file."""
    fakes.install(tmp_path, monkeypatch)
    path = [os.environ["PYTHONPATH"], str(slurm.command.REPOSITORY)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    acts = hyper.zipit(
        [
            hyper.sweep("act", ["wait", "finish", "finish", "finish"]),
            hyper.sweep("config.seed", [1, 2, 3, 4]),
        ]
    )
    made = fakes.sweep(tmp_path, acts)
    monkeypatch.setattr(slurm.command, "prepared", lambda *_: made)
    return made


@pytest.fixture
def flags():
    """Parse the flags of the back end; afterwards they are the defaults again."""
    yield slurm.FLAGS
    slurm.FLAGS.unparse_flags()
    slurm.FLAGS(["slurm", "--nowait", "--cluster=slurm", "--minutes=60", "--cpus=8"])


def words(sweep):
    return [one.word for one in states.of(sweep)]


def has_begun(sweep, tmp_path):
    """Whether the first unit waits, ready for signals, and the others have finished."""
    waits = f"start {sweep.units[0].name}" in fakes.events(tmp_path)
    return waits and words(sweep) == ["running", *["finished"] * 3]


@pytest.mark.slow
@pytest.mark.more
def test_an_array_on_two_nodes_goes_on_after_a_requeue(
    cluster, sweep, flags, tmp_path, capsys
):
    """Oracle: events of the fake main: TERM is saved for, the same job goes on."""
    flags(["slurm", "--cpus=1", "--minutes=30"])
    assert slurm.main([]) == 0
    job = capsys.readouterr().out.split("job ")[1].split("_")[0]
    wait_for(lambda: has_begun(sweep, tmp_path), 300)
    run("scancel", "--signal=TERM", f"{job}_0")
    wait_for(lambda: words(sweep)[0] == "stopped", 300)
    wait_for(lambda: not run("squeue", "--noheader", f"--jobs={job}").strip(), 300)
    (tmp_path / "gate").touch()
    run("scontrol", "requeue", f"{job}_0")
    wait_for(lambda: words(sweep) == ["finished"] * 4, 300)
    name = sweep.units[0].name
    mine = [event for event in fakes.events(tmp_path) if event.endswith(name)]
    assert [event.split()[0] for event in mine] == ["start", "saved", "start", "end"]


@pytest.mark.slow
@pytest.mark.more
def test_a_job_whose_time_is_up_saves_and_is_queued_again(
    cluster, sweep, flags, tmp_path, capsys
):
    """Oracle: events of the fake main; USR2 is what submitit asks SLURM to send."""
    flags(["slurm", "--cpus=1", "--minutes=30"])
    assert slurm.main([]) == 0
    job = capsys.readouterr().out.split("job ")[1].split("_")[0]
    wait_for(lambda: has_begun(sweep, tmp_path), 300)
    run("scancel", "--signal=USR2", f"{job}_0")
    name = sweep.units[0].name
    wait_for(lambda: f"saved {name}" in fakes.events(tmp_path))
    (tmp_path / "gate").touch()
    wait_for(lambda: words(sweep) == ["finished"] * 4, 300)


def test_without_slurm_submitit_runs_processes(sweep, flags, tmp_path, capsys):
    """Oracle: all units finish; --wait stays and tells the table."""
    (tmp_path / "gate").touch()
    flags(["slurm", "--cluster=local", "--wait"])
    assert slurm.main([]) == 0
    assert words(sweep) == ["finished"] * 4
    assert "page: " in capsys.readouterr().out


def test_what_is_missing_is_one_line(flags, monkeypatch, tmp_path):
    """Oracle: the lines, by hand."""
    flags(["slurm"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: is not installed here: start it on a"):
        slurm.main([])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'flowgrpo_jax\[slurm\]'"):
        slurm.main([])
    flags(["slurm", "--topology=v5e:2x4"])
    with pytest.raises(UserError, match="v5e:2x4: SLURM has GPUs: give h100:8"):
        slurm._gpus()
