"""A real sweep on the tiny model: rows as by hand, and after a launcher was killed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import states, sweep_dir, unit
from tests.launch.test_unit import wait_for
from tests.tiny_run import rows

CONFIG = """
from flowgrpo_jax import config as configs

def get_config(arg=None):
    prompts = {prompts!r}
    return configs.make(
        arg, model={model!r}, prompts=prompts, eval__prompts=prompts,
        num_iterations=3, prompts_per_iteration=2, group_size=2, microbatch=2,
        updates_per_iteration=1, sample__num_steps=2, sample__eval_num_steps=2,
        sample__guidance_scale=1.0, eval__guidance_scale=1.0, eval__every=0,
        eval__sde=False, eval__images_per_task=1, eval__final_images_per_task=1,
        checkpoint__every=1, log__tensorboard=False, train__use_lora=False,
        train__parameters="proj_out", reward={{"jpeg_compressibility": 1.0}},
        monitors=(),
    )

def sweep(hyper):
    return hyper.product([
        hyper.sweep("config.seed", [1, 2]),
        hyper.fixed("config.train.learning_rate", 1e-2),
    ])
"""


@pytest.fixture
def config(tmp_path, weights_file):
    """A config with a sweep beside it, in a folder with a space."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na photo of two rings\n")
    path = tmp_path / "my config.py"
    path.write_text(CONFIG.format(prompts=str(prompts), model=weights_file))
    return path


def launcher(module, config, root, *words):
    return subprocess.Popen(
        [sys.executable, "-m", module, f"--config={config}", f"--root={root}", *words],
        cwd=Path(__file__).parents[2],
        text=True,
        stdout=subprocess.PIPE,
    )


def same(workdir, other):
    return json.dumps(rows(workdir)) == json.dumps(rows(other))  # NaN is NaN in JSON


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="two cores"
)
def test_a_sweep_whose_launcher_is_killed(config, tmp_path):
    """Oracle: a run by hand, by the line that the unit's log begins with."""
    root = tmp_path / "runs"
    two = "--max_parallel=2"
    first = launcher("launch.local", config, root, two)
    sweep = root / "1"
    wait_for(lambda: len(list(sweep.glob("*/checkpoints/2"))) > 0, 600)
    first.kill()
    first.communicate()
    before = states.of(sweep_dir.read(sweep))
    second = launcher("launch.local", config, root, two)
    told = second.communicate(timeout=900)[0]
    assert second.returncode == 0, told
    now = states.of(sweep_dir.read(sweep))
    assert [one.word for one in now] == ["finished"] * 2
    for one, old in zip(now, before, strict=True):
        starts = unit.read(sweep / one.unit.name)["starts"]
        assert starts == {"finished": 1, "waiting": 1}.get(old.word, 2)
    assert (sweep / "sweep.html").stat().st_size > 10_000
    assert "2-seed=2" in told
    # One unit that was disturbed, by hand.
    disturbed = next(
        one for one in now if unit.read(sweep / one.unit.name)["starts"] > 1
    )
    line = (sweep / disturbed.unit.name / unit.LOG).read_text().splitlines()[0]
    words = [word for word in shlex.split(line[2:]) if not word.startswith("--workdir")]
    by_hand = tmp_path / "by hand"
    subprocess.run([*words, f"--workdir={by_hand}"], check=True, capture_output=True)
    assert same(sweep / disturbed.unit.name, by_hand)


@pytest.mark.slow
def test_the_command_refuses_in_one_line(config, tmp_path):
    """Oracle: the lines and the exit code of wrong input, by hand; nothing starts."""
    root = tmp_path / "runs"
    for module, words, line in (
        ("launch", ["nowhere"], "error: back end: nowhere: must be one of local, xm"),
        (
            "launch.local",
            ["--config.seed=1"],
            "error: --config.seed=1: is a flag of the",
        ),
        (
            "launch.local",
            ["--", "--config.sed=1"],
            "error: unit 1: sed: unknown config",
        ),
    ):
        argv = [sys.executable, "-m", module, *words]
        if module != "launch":
            argv[3:3] = [f"--config={config}", f"--root={root}"]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(line), done.stderr
        assert done.stderr.count("\n") == 1 and not root.exists()
