"""SLURM by submitit: a real cluster of two nodes on this machine, where it is installed."""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from absl import logging

from benchmarks import kill
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.workdir import checkpoint_steps
from launch import hyper, slurm, states, sweep_dir, units
from tests.launch import fakes
from tests.launch.test_unit import wait_for

# jax takes the first node's name for the address of process 0: those of "main" are
# addresses, those of "nowhere" resolve to nothing.
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
SlurmctldPort={ports[0]}
NodeName=DEFAULT CPUs=2
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}]
NodeName=nowhere[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[3]}-{ports[4]}]
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE OverSubscribe=FORCE
PartitionName=nowhere Nodes=nowhere[0-1] MaxTime=INFINITE OverSubscribe=FORCE
"""
NODES = ("127.0.0.1", "127.0.0.2", "nowhere0", "nowhere1")
# What learns is small, and programs are compiled without what makes them fast.
SMALL = (
    *("--config.train.use_lora=False", "--config.train.parameters=proj_out"),
    *("--config.eval.every=1", "--config.eval.sde=False"),
)
XLA_FLAGS = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_extra_options="
    "xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size"
)


def run(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def free_ports(count):
    """Neighbouring ports that are free now."""
    for first in range(17000, 20000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return range(first, first + count)
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no ports")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(folder):
    """Idle nodes; skipped where Debian's slurm-wlm and munge, or root, are not."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root, and apt-get install slurm-wlm munge")
    for name in ("state", *NODES):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    text = CONF.format(host=host, folder=folder, ports=free_ports(1 + len(NODES)))
    (folder / "slurm.conf").write_text(text)
    for place in ("/run/munge", "/var/log/munge"):
        os.makedirs(place, exist_ok=True)
        shutil.chown(place, "munge", "munge")
    run("runuser", "-u", "munge", "--", "munged")  # one that runs already stays
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for daemon in (["slurmctld"], *(["slurmd", "-N", name] for name in NODES)):
            subprocess.run(daemon, check=True)
        state = ["sinfo", "--noheader", "--format=%D %t", "--partition=main,nowhere"]
        wait_for(lambda: run(*state).split() == ["4", "idle"])
        yield
        run("scancel", "--user=root")
        run("scontrol", "shutdown")


@pytest.fixture(scope="module", autouse=True)
def absl_keeps_to_the_stream_of_the_process():
    """Importing submitit closes the stream of every logging handler of the process.

    It configures logging by a dictionary. absl's handler then closes whatever stream is
    not the process's own: pytest's, if that was in place when absl was imported.
    """
    handler = logging.get_absl_handler().python_handler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "stream", sys.__stderr__)
        yield


def fake_sweep(folder, patch, *acts):
    """A unit of the fake main for each act."""
    fakes.install(folder, patch)
    path = [os.environ["PYTHONPATH"], str(slurm.command.REPOSITORY)]
    patch.setenv("PYTHONPATH", os.pathsep.join(path))
    seeds = hyper.sweep("config.seed", range(len(acts)))
    return fakes.sweep(folder, hyper.zipit([hyper.sweep("act", acts), seeds]))


def parsed(*words):
    """The flags of the back end; first they are the defaults again."""
    slurm.FLAGS.unparse_flags()
    slurm.FLAGS(["slurm", "--nowait", "--cluster=slurm", "--minutes=60", "--cpus=8"])
    slurm.FLAGS(["slurm", "--nodes=1", *words])


@pytest.fixture
def flags():
    yield parsed
    parsed()


def words(sweep):
    return [one.word for one in states.of(sweep)]


def submitted(made, *flags):
    """The number of the job that the back end makes of a sweep."""
    parsed("--cpus=1", "--minutes=30", *flags)
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(slurm.command, "prepared", lambda *_: made)
        assert slurm.main([]) == 0
    parsed()
    return told.getvalue().split(": job ")[1].split()[0].split("_")[0]


class Jobs:
    """What runs on the cluster: all at once, since most of it is waiting."""

    def __init__(self, folder, patch):
        self.folder = folder
        extra = [*kill.words(folder), *SMALL]
        points = hyper.fixed("config.seed", 42)
        real = units.make("configs/geneval.py", points, extra)
        cpu = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
        with (folder / "quiet.log").open("wb") as log:
            more = cpu | {"JAX_NUM_CPU_DEVICES": "2"}
            self.alone = kill.start(folder, folder / "quiet", log, SMALL, more)
        home = {"HOME": str(folder / "home"), "JAX_NUM_CPU_DEVICES": "1"}
        for name, value in (cpu | home).items():
            patch.setenv(name, value)
        self.two = sweep_dir.open_sweep(str(folder / "two"), "1", real, "")
        self.two_job = submitted(self.two, "--nodes=2")
        self.lost = sweep_dir.open_sweep(str(folder / "lost"), "1", real, "")
        submitted(self.lost, "--nodes=2", "--partition=nowhere")
        self.fake = fake_sweep(folder, patch, *["wait once"] * 2, *["finish"] * 2)
        self.fake_job = submitted(self.fake)

    def events(self, number):
        """What befell the fake unit with this number in the array."""
        lines = [line.split() for line in fakes.events(self.folder)]
        name = self.fake.units[number].name
        return [event for event, unit in lines if unit == name]


@pytest.fixture(scope="module")
def jobs(cluster, folder):
    with pytest.MonkeyPatch.context() as patch:
        made = Jobs(folder, patch)
    yield made
    made.alone.kill()
    made.alone.wait()


def starts_again(job):
    """Start a job that is queued again: SLURM would let it wait for two minutes.

    It counts in seconds what it has just ended, and within the same one refuses the job.
    """
    shown = ["scontrol", "show", "job", job]
    wait_for(lambda: "JobState=PENDING" in run(*shown), 120)
    time.sleep(3)
    run("scontrol", "update", f"JobId={job}", "StartTime=now")


def stop_and_requeue(job, sweep):
    """SIGTERM for the first unit, which saves; then its job is started again."""
    run("scancel", "--signal=TERM", job)
    wait_for(lambda: words(sweep)[0] == "stopped", 300)
    wait_for(lambda: not run("squeue", "--noheader", f"--jobs={job}").strip(), 300)
    run("scontrol", "requeue", job)
    starts_again(job)


@pytest.mark.slow
@pytest.mark.more
def test_a_unit_of_two_nodes_goes_on_after_a_requeue(jobs):
    """Oracle: a run of one process with as many devices: its rows and weights.

    Both tasks get the SIGTERM; what the second one prints is in no file of the first.
    """
    workdir = jobs.two.workdir(jobs.two.units[0])
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text(), 300)
    stop_and_requeue(jobs.two_job, jobs.two)
    saved = checkpoint_steps(workdir)[-1]
    assert 0 < saved < 4
    wait_for(lambda: words(jobs.two) == ["finished"], 300)
    assert jobs.alone.wait(600) == 0
    assert kill.same(workdir, jobs.folder / "quiet")
    log = (workdir / "log.txt").read_text()
    assert log.count(f"stopped at iteration {saved}") == 1
    second = (workdir / "logs" / "process_1.log").read_text()
    assert f"going on from iteration {saved}" in second
    wait_for(lambda: "State=COMPLETED" in run("scontrol", "show", "job", jobs.two_job))


@pytest.mark.slow
@pytest.mark.more
def test_a_node_whose_name_does_not_resolve_is_told(jobs):
    """Oracle: the line, on both nodes, in a job that is not queued again."""
    wait_for(lambda: words(jobs.lost) == ["failed"], 300)
    [state] = states.of(jobs.lost)
    line = "error: --coordinator: nowhere0: the name does not resolve on "
    assert state.code == 2 and state.last_line.startswith(line)
    told = [*(jobs.lost.path / "submitit").glob("*_1_log.err")]
    assert [path.read_text().count(line) for path in told] == [1]
    assert not (jobs.lost.workdir(state.unit) / "config.json").exists()


@pytest.mark.slow
@pytest.mark.more
def test_an_array_on_two_nodes_goes_on_after_a_requeue(jobs):
    """Oracle: events of the fake main: TERM is saved for, the same job goes on."""
    wait_for(lambda: jobs.events(0) == ["start"] and "running" == words(jobs.fake)[0])
    stop_and_requeue(f"{jobs.fake_job}_0", jobs.fake)
    wait_for(lambda: words(jobs.fake)[0] == "finished", 300)
    assert jobs.events(0) == ["start", "saved", "start", "end"]
    wait_for(lambda: words(jobs.fake)[2:] == ["finished"] * 2, 300)


@pytest.mark.slow
@pytest.mark.more
def test_a_job_whose_time_is_up_saves_and_is_queued_again(jobs):
    """Oracle: events of the fake main; USR2 is what submitit asks SLURM to send."""
    wait_for(lambda: jobs.events(1) == ["start"] and "running" == words(jobs.fake)[1])
    run("scancel", "--signal=USR2", f"{jobs.fake_job}_1")
    wait_for(lambda: "saved" in jobs.events(1))
    starts_again(f"{jobs.fake_job}_1")
    wait_for(lambda: words(jobs.fake)[1] == "finished", 300)
    assert jobs.events(1) == ["start", "saved", "start", "end"]


def test_without_slurm_submitit_runs_processes(flags, tmp_path, monkeypatch, capsys):
    """Oracle: all units finish; --wait stays and tells the table."""
    made = fake_sweep(tmp_path, monkeypatch, "finish", "finish")
    monkeypatch.setattr(slurm.command, "prepared", lambda *_: made)
    flags("--cluster=local", "--wait")
    assert slurm.main([]) == 0
    assert words(made) == ["finished"] * 2
    assert "page: " in capsys.readouterr().out


def test_what_is_missing_is_one_line(flags, monkeypatch, tmp_path):
    """Oracle: the lines, by hand."""
    flags()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: is not installed here: start it on a"):
        slurm.main([])
    flags("--cluster=local", "--nodes=2")
    with pytest.raises(UserError, match="--nodes: 2: must be 1 with --cluster=local"):
        slurm.main([])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'flowgrpo_jax\[slurm\]'"):
        slurm.main([])
    flags("--topology=v5e:2x4")
    with pytest.raises(UserError, match="v5e:2x4: SLURM has GPUs: give h100:8"):
        slurm._gpus()
    flags("--topology=h100:16", "--nodes=3")
    with pytest.raises(UserError, match="--nodes: 3: must divide the chips of h100:16"):
        slurm._gpus()
    flags("--topology=h100:16", "--nodes=2")
    assert slurm._gpus() == 8
