"""The package as a library, as the README shows it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flowgrpo_jax
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import overrides
from flowgrpo_jax.errors import UserError
from tests.tiny_run import tiny_config

ROOT = Path(__file__).parents[1]


def test_importing_it_is_light():
    """Oracle: the modules of a process that has imported it."""
    code = (
        "import sys, flowgrpo_jax\n"
        "assert set(flowgrpo_jax.__all__) <= set(dir(flowgrpo_jax))\n"
        "flowgrpo_jax.config, flowgrpo_jax.recipes\n"
        "print([n for n in ('jax', 'flax', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_names_are_unknown():
    """Oracle: Python's own contract of a module."""
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = flowgrpo_jax.nothing


def test_one_version():
    """Oracle: every file that tells one."""
    held = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert held["version"] == flowgrpo_jax.__version__
    told = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert told.stdout.splitlines()[-1] == flowgrpo_jax.__version__


def test_the_lines_of_the_readme(weights_file, tmp_path, monkeypatch, capsys):
    """Oracle: that they run; the task is a tiny one in place of GenEval's."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    tiny = tiny_config(weights_file, num_iterations=1, eval__every=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        flowgrpo_jax.config, "load", lambda source: configs.from_json(tiny.to_dict())
    )
    code = block[1].replace("config.num_iterations = 400", "")
    exec(compile(code, "README.md", "exec"), space := {})
    assert space["images"].shape == (2, 24, 24, 3)
    assert {"jpeg_compressibility"} <= set(
        space["jpeg"](space["images"], [space["Prompt"]("a"), space["Prompt"]("b")])
    )
    report = (tmp_path / "runs" / "geneval" / "report.html").read_text()
    assert "-m flowgrpo_jax.main" not in report  # no command has started this run
    out = capsys.readouterr().out
    assert "jpeg_compressibility" in out.splitlines()[-1] or "array" in out
    with pytest.raises(UserError, match="is no diffusers model"):
        space["policy"].export(tmp_path / "out")
    assert "the EMA after 1 iterations" in repr(space["policy"])


def test_a_config_that_is_not_here_is_the_packages(tmp_path, monkeypatch):
    """Oracle: the files of configs/; what is here, or nowhere, is left alone."""
    monkeypatch.chdir(tmp_path)
    found = overrides.installed("configs/geneval.py:recipe=g2rpo")
    assert Path(found.partition(":")[0]).samefile(ROOT / "configs" / "geneval.py")
    assert found.endswith(":recipe=g2rpo")
    assert flowgrpo_jax.config.load("configs/ocr.py").model == "words"
    for other in ("configs/none.py", "mine/geneval.py", "geneval.py"):
        assert overrides.installed(other) == other
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "geneval.py").write_text("")
    assert overrides.installed("configs/geneval.py") == "configs/geneval.py"
    argv = ["main", "--config=configs/ocr.py", "--config", "configs/ocr.py"]
    assert all(str(ROOT) in word for word in overrides.from_package(argv)[1::2])
