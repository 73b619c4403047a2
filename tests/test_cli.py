"""Wrong command lines: one line that names key, value and remedy, exit status 2."""

import copy
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from flowgrpo_jax import cli, main
from flowgrpo_jax.config import overrides
from flowgrpo_jax.errors import UserError

CONFIG = "--config=configs/geneval.py"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def parse(monkeypatch):
    """Command line to the flags of a fresh `main`."""

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        module = importlib.reload(main)  # flags are parsed once
        cli.parse(module.FLAGS)
        return module.FLAGS

    return parsed


WRONG = [
    ("--config.tran.beta=1", "tran.beta: unknown config key: did you mean train.beta?"),
    ("--config.train.bta=1", "train.bta: unknown config key: did you mean train.beta?"),
    ("--config.seed.x=1", "seed.x: unknown config key: did you mean seed?"),
    ("--config.zzzz=1", "zzzz: unknown config key: the keys are checkpoint, dtype"),
    ("--config.group_size=abc", "group_size: abc: must be a whole number, such as 16"),
    ("--config.resolution=0x512", "resolution: 0x512: must be 0, pixels of a square"),
    ("--config.group_size=1.5", "group_size: 1.5: must be a whole number, such as 16"),
    ("--config.train.beta=x", "train.beta: x: must be a number, such as 0.4"),
    ("--config.train.ema=maybe", "train.ema: maybe: must be true or false"),
    ("--config.train=3", "train: 3: is a group: set --config.train."),
    ("--config.reward=foo", "reward: foo: is a group: set --config.reward.geneval=..."),
    ("--config.reward={'a.b': 1}", "reward: {'a.b': 1}: name it in a config file: he"),
    ("--config.sample.branch_steps=(0,", "sample.branch_steps: (0,: must be a tuple"),
    ("--config.mesh=[1]", "mesh: [1]: is a group: set --config.mesh.data"),
    ("--config.beta=0.1", "beta: unknown config key: did you mean train.beta"),
    ("--config.reward.foo=1", "reward: foo: must be one of geneval"),
    ("--config.recipe=g2rpo", "recipe: g2rpo: must be one of flow_grpo, "),
    ("--nosuchflag", "--nosuchflag: unknown flag: must be one of --config, --workdir"),
    ("--workdri=x", "--workdri: unknown flag: did you mean --workdir?"),
    ("extra", "extra: not a flag: values are given as --name=value"),
]


@pytest.mark.parametrize("argument, line", WRONG)
def test_a_wrong_flag_is_one_line(parse, argument, line):
    """Oracle: how the line begins, by hand."""
    with pytest.raises(UserError) as caught:
        parse(CONFIG, argument)
    assert str(caught.value).startswith(line)


def test_a_recipe_is_chosen_in_the_config(parse):
    """Oracle: the remedy, by hand: other keys hang on the recipe."""
    with pytest.raises(UserError, match=r"--config=configs/geneval\.py:recipe=NAME"):
        parse(CONFIG, "--config.recipe=flow_grpo_fast")
    config = parse(f"{CONFIG}:recipe=flow_grpo_fast")["config"].value
    assert config.recipe == "flow_grpo_fast" and config.train.beta == 0.0


@pytest.mark.parametrize(
    "source, line",
    [
        ("nofile.py", "--config: nofile.py: no such file or directory: give a"),
        ("README.md", "--config: README.md: SyntaxError: "),
        (
            "flowgrpo_jax/errors.py",
            "--config: flowgrpo_jax/errors.py: has no function get",
        ),
        ("configs/geneval.py:recipe=g2", "recipe: g2: must be one of flow_grpo, "),
        ("configs/geneval.py:reward=ocr", "reward: ocr: set it with --config.reward."),
    ],
)
def test_a_config_that_cannot_be_loaded_is_one_line(source, line):
    """Oracle: how the line begins, by hand."""
    with pytest.raises(UserError) as caught:
        overrides.load_config(source)
    assert str(caught.value).startswith(line)


def test_a_config_of_another_type_is_refused(tmp_path):
    """Oracle: the line, by hand."""
    path = tmp_path / "mine.py"
    path.write_text("def get_config(arg=None):\n    return {'seed': 1}\n")
    with pytest.raises(UserError, match="gives dict: must be a ConfigDict"):
        overrides.load_config(str(path))


def test_right_values_arrive(parse):
    """Oracle: the values given, in every spelling that absl knows."""
    values = parse(
        CONFIG,
        "--config.reward.geneval=0.5",
        "--config.seed",
        "7",
        "--noconfig.train.ema",
        "--config.train.use_lora",
        "--config.train.beta=1",
        "--config.sample.sde_window_range=(1, 3)",
    )
    config = values["config"].value
    assert config.reward.geneval == 0.5 and config.seed == 7
    assert not config.train.ema and config.train.use_lora
    assert config.train.beta == 1.0 and config.sample.sde_window_range == (1, 3)
    other = parse(CONFIG, "--config.train.lora_targets=attn")["config"].value
    assert other.train.lora_targets == ("attn",)
    for given, held in (("64x96", "64x96"), ("512", 512)):
        other = parse(CONFIG, f"--config.resolution={given}")["config"].value
        assert other.resolution == held
    other = parse(CONFIG, "--config.reward={'geneval': 2.0}")["config"].value
    assert other.reward.to_dict() == {"geneval": 2.0}


def test_print_config_prints_the_final_values_and_stops(parse, capsys, monkeypatch):
    """Oracle: the lines, by hand; nothing is loaded and no workdir is made."""
    monkeypatch.setattr(cli, "workdir", None)
    parse(CONFIG, "--print_config", "--config.seed=7", "--config.train.beta=0.5")
    assert main.main() == 0
    lines = capsys.readouterr().out.splitlines()
    changed = lines[
        1 : next(i for i, line in enumerate(lines[1:], 1) if line[0] == "#")
    ]
    assert "seed = 7  (default 42)" in changed
    assert "train.beta = 0.5  (default 0.04)" in changed
    assert "num_iterations = 400" not in changed
    assert "num_iterations = 400" in lines


def test_home_is_the_home_folder_behind_an_equals_sign(parse, monkeypatch, tmp_path):
    """Oracle: what a shell does where `~` begins a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from flowgrpo_jax import config\ndef get_config(arg=None):\n"
        "    return config.make(arg)\n"
    )
    for config in ("--config=~/mine.py:recipe=awm", "--config ~/mine.py:recipe=awm"):
        values = parse(*config.split(), "--workdir=~/runs/x", "--config.train.beta=1")
        assert values["config"].value.recipe == "awm"
        where = cli.workdir(values["workdir"].value, values["config"])
        assert where == tmp_path / "runs" / "x"
    assert parse("--workdir", "~/y")["workdir"].value == str(tmp_path / "y")
    assert parse("--workdir=a~")["workdir"].value == "a~"


COMMANDS = ("main", "sample", "compare", "evaluate", "export", "estimate")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_of_every_command_names_its_flag(name, monkeypatch):
    """Oracle: the start of the line; each flag that is a number is tried."""
    module = importlib.import_module(f"flowgrpo_jax.{name}")
    for flag in list(module.FLAGS):
        kind = module.FLAGS[flag].flag_type()
        if kind not in ("int", "float"):
            continue
        for value in (
            "-1",
            "x",
            "nan",
            "1e400",
            "99999999999999999999",
            "",
            "1" * 5000,
        ):
            values = flags.FlagValues()
            values[flag] = copy.deepcopy(module.FLAGS[flag])
            monkeypatch.setattr(sys, "argv", [name, f"--{flag}={value}"])
            with pytest.raises(UserError) as caught:
                cli.parse(values)
            assert str(caught.value).startswith(f"--{flag}: "), value
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "argument, line",
    [
        ("--seed=-1", "--seed: -1: must be at least 0, at most 4294967295"),
        ("--num_steps=0", "--num_steps: 0: must be at least 1, at most 1000"),
        ("--num_steps=x", "--num_steps: x: must be a whole number"),
        ("--guidance_scale=nan", "--guidance_scale: nan: must be at least 0"),
        ("--guidance_scale=a:b", "--guidance_scale: a:b: must be a number"),
        ("--keep=0", "--keep: 0.0: must be above 0, at most 1"),
        ("--checkpoint=-5", "--checkpoint: -5: must be at least 0"),
        ("--workdir=", "--workdir: '': must be the folder of a run"),
        ("--output=", "--output: '': must be a file or folder"),
        ("--search=best", "--search: best: value should be one of <best_of_n|"),
        ("--num_images=0", "--num_images: 0: "),
    ],
)
def test_a_flag_of_sample_is_named(argument, line, monkeypatch):
    """Oracle: how the line begins, by hand."""
    module = importlib.reload(importlib.import_module("flowgrpo_jax.sample"))
    monkeypatch.setattr(sys, "argv", ["sample", "--prompt=x", argument])
    with pytest.raises(UserError) as caught:
        cli.parse(module.FLAGS)
    assert str(caught.value).startswith(line)


def test_overrides_need_a_config(parse):
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match=r"^--config\.seed: needs --config=FILE"):
        parse("--config.seed=1")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("seed: x:\n  y"), 2, "error: seed: x: y\n"),
        (OSError(28, "No space left on device", "f"), 2, "error: f: No space left"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_end_with_a_line_and_a_status(
    monkeypatch, capsys, error, status, line
):
    """Oracle: exit status and stderr, by hand."""
    monkeypatch.setattr(cli, "parse", lambda values: None)
    monkeypatch.setattr(cli.platform, "configure", lambda: None)
    monkeypatch.setattr(sys, "argv", ["main"])

    def failing():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(failing, main.FLAGS)
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith(line)


def test_a_process_exits_with_2_and_one_line(tmp_path):
    """Oracle: the same from outside; nothing is written."""
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "flowgrpo_jax.main", CONFIG, f"--workdir={workdir}"]
        + ["--config.train.bta=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and not done.stdout and not workdir.exists()
    assert done.stderr == (
        "error: train.bta: unknown config key: did you mean train.beta?\n"
    )


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(weights_file, tmp_path):
    """Oracle: exit status 128 + 15, and the checkpoint of the iterations done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flowgrpo_jax.main", CONFIG, f"--workdir={tmp_path}"]
        + [f"--config.model={weights_file}", "--config.num_iterations=100000"]
        + ["--config.prompts_per_iteration=2", "--config.group_size=4"]
        + ["--config.microbatch=4", "--config.sample.num_steps=7"]
        + ["--config.sample.eval_num_steps=1", "--config.checkpoint.every=100000"]
        + ["--config.eval.images_per_task=1", "--config.eval.final_images_per_task=1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 300
    while '"train"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 143
    assert "Traceback" not in errors
    rows = metrics.read_text().count('"train"')
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(rows)]


_LEAVES_A_THREAD = """
import sys, threading, time
from absl import flags
from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import stopping
stopping.install()
def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise {error}
sys.argv = ["command"]
cli.run(main, flags.FlagValues())
"""


@pytest.mark.parametrize(
    "error, code",
    [
        ("UserError('a line')", 2),
        ("ValueError('a fault')", 1),
        ("BrokenPipeError(32, 'Broken pipe')", 141),
    ],
)
def test_a_process_ends_though_nobody_reads_its_line(error, code):
    """Oracle: the exit code; a thread that a user's code left must not hold it."""
    reading, writing = os.pipe()
    os.close(reading)
    source = _LEAVES_A_THREAD.format(error=error)
    done = subprocess.run([sys.executable, "-c", source], stderr=writing, timeout=120)
    os.close(writing)
    assert done.returncode == code
