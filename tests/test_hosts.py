"""A run as several processes of this machine: the same rows, one stop, one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowgrpo_jax.runtime.workdir import checkpoint_steps
from tests.runtime.test_cluster import ended, free_port
from tests.tiny_run import rows

# Compiled in two thirds of the time, as by tests/conftest.py.
FLAGS = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size"
RUN = """
import json, os, sys, time
from absl import flags
from flowgrpo_jax import cli
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.runtime import cluster, environment, stopping
from flowgrpo_jax.train import train
from tests.tiny_run import reward_spread, tiny_config
index, count, port, weights, workdir, values, seconds, version = sys.argv[1:]
sys.argv = sys.argv[:1]
if version:
    environment.versions = lambda: {"jax": version}
def reward(images, prompts):
    time.sleep(float(seconds))
    return reward_spread(images, prompts)
registry.REWARDS["geneval"] = lambda context, **options: reward
def main():
    address = cluster.given("127.0.0.1:" + port, int(count), int(index))
    with cluster.joined(address):
        done = train(tiny_config(weights, **json.loads(values)), workdir)
    return 0 if done else stopping.status()
stopping.install()
cli.run(main, flags.FlagValues(), computes=False)
"""


def start(weights, workdir, count=1, index=0, port=1, version="", slow=0.0, **values):
    """One process of a tiny run on two devices; `slow`: seconds of a call of its reward."""
    values |= {"eval__prompts": write_prompts(weights), "eval__sde": False}
    words = (index, count, port, weights, workdir, json.dumps(values), slow, version)
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(2 // count), "XLA_FLAGS": FLAGS},
    )


def write_prompts(weights):
    """Two held-out prompts in a file beside the weights, so that evaluations are short."""
    path = Path(weights).with_name("eval.jsonl")
    include = [{"class": "circle", "count": 1, "color": "red"}]
    record = {"tag": "colors", "include": include}
    texts = ("a red circle", "a picture of a red circle")
    lines = [json.dumps({"prompt": text} | record) + "\n" for text in texts]
    path.write_text("".join(lines))
    return str(path)


def two(weights, workdirs, **values):
    """Two processes of it; workdirs and values may be one for each."""
    port = free_port()
    return [
        start(
            weights,
            workdirs[index],
            *(2, index, port),
            **{name: value[index] for name, value in values.items()},
        )
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_hosts_write_the_rows_of_one_and_stop_together(weights_file, tmp_path):
    """Oracle: a run of one process; a signal to the second of two ends both, saved.

    What one process then goes on with is what two have made.
    """
    quiet, workdir = tmp_path / "quiet", tmp_path / "run"
    [(code, _, errors)] = ended([start(weights_file, quiet)])
    assert (code, errors) == (0, [])
    pair = two(weights_file, [workdir] * 2, slow=[0.3] * 2)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.05)
        assert pair[0].poll() is None, ended(pair)
    pair[1].send_signal(signal.SIGTERM)
    found = ended(pair)
    assert [code for code, _, _ in found] == [143, 143]
    [saved] = checkpoint_steps(workdir)[-1:]
    assert rows(workdir)[-1]["iteration"] == saved - 1
    log = (workdir / "logs" / "process_1.log").read_text()
    assert f"stopped at iteration {saved}" in log
    assert [path.name for path in (workdir / "logs").iterdir()] == ["process_1.log"]
    [(code, told, errors)] = ended([start(weights_file, workdir)])
    assert (code, errors) == (0, [])
    assert json.dumps(rows(workdir)) == json.dumps(rows(quiet))  # with NaN
    timed = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert {"time/host_0", "time/host_1"} <= timed[1].keys()


def refused(pair, *words):
    """Both end with wrong input, in one line that has these words."""
    for code, _, [line] in ended(pair):
        assert code == 2
        assert all(word in line for word in words), line


def test_hosts_with_different_configs_write_nothing(weights_file, tmp_path):
    workdir = tmp_path / "run"
    pair = two(weights_file, [workdir] * 2, train__learning_rate=[1e-4, 2e-4])
    refused(
        pair, "config.train.learning_rate: 0.0002 on process 1", "0.0001 on process 0"
    )
    assert not workdir.exists()


def test_a_host_with_another_jax_is_named(weights_file, tmp_path):
    workdir = tmp_path / "run"
    pair = two(weights_file, [workdir] * 2, version=["0.10.2", "0.11.2"])
    refused(pair, "version.jax: 0.11.2 on process 1", "0.10.2 on process 0")
    assert not workdir.exists()


def test_a_workdir_that_is_not_shared_is_told(weights_file, tmp_path):
    """As it were on two hosts: the same path, and other folders behind it."""
    workdirs = [tmp_path / "here" / "run", tmp_path / "there" / "run"]
    refused(two(weights_file, workdirs), "is not what process 0 writes to")
    assert not list(tmp_path.glob("*/*"))
