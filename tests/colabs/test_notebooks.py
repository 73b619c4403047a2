"""The notebooks of colabs/: executed from top to bottom, and in step with their sources."""

import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest

from colabs import build
from tests.parity.tiny_sd3 import write_pipeline

# Values of the parameters with which a notebook takes seconds; all cells stay.
TINY_RUN = {
    "prompts_per_iteration": 2,
    "group_size": 4,
    "microbatch": 4,
    "sample.num_steps": 8,
    "sample.eval_num_steps": 2,
    "eval.images_per_task": 1,
    "eval.final_images_per_task": 1,
    "log.tensorboard": False,
}
PARAMETERS = {
    "quickstart": {"NUM_ITERATIONS": 2, "OVERRIDES": TINY_RUN},
    "how_it_works": {"SAMPLES": 200, "ITERATIONS": 2},
    "your_reward": {"NUM_ITERATIONS": 2, "OVERRIDES": TINY_RUN},
    "sd35_lora_tpu": build.TINY_PIPELINE,
}
LARGEST = 1_500_000  # bytes of a notebook with its outputs


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.parametrize("name", build.NOTEBOOKS)
def test_it_runs_from_top_to_bottom(name, weights_file, tmp_path):
    """Oracle: every cell's own asserts; a cell that fails raises here."""
    parameters = dict(PARAMETERS[name])
    if "OVERRIDES" in parameters:
        parameters["OVERRIDES"] = {"model": weights_file, **parameters["OVERRIDES"]}
    if name == "sd35_lora_tpu":
        write_pipeline(tmp_path / parameters["MODEL"])
    # One CPU device for each core, as a user has; programs compile as in other tests.
    flags = os.environ["XLA_FLAGS"].split()
    quick = [flag for flag in flags if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(quick)}
    notebook = build.execute(name, parameters, tmp_path, environment)
    assert_good(notebook)


def test_a_parameter_that_is_none_is_refused(tmp_path):
    """Oracle: KeyError, before anything runs."""
    with pytest.raises(KeyError, match="SAMPELS is no parameter"):
        build.execute("how_it_works", {"SAMPELS": 1}, tmp_path)


@pytest.mark.parametrize("name", build.NOTEBOOKS)
def test_what_is_checked_in_is_in_step(name):
    """Oracle: the source; no output is an error, and some are pictures."""
    path = build.HERE / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    shown, source = notebook.cells, build.read_source(name).cells
    again = f"python -m colabs.build {name}"
    assert [(x.cell_type, x.source) for x in shown] == [
        (x.cell_type, x.source) for x in source
    ], again
    assert_good(notebook)
    text = path.read_text()
    assert len(text) < LARGEST
    for folder in (Path(tempfile.gettempdir()), Path.home(), build.HERE.parent):
        assert folder == Path("/") or f"{folder}/" not in text  # of one machine


def test_the_stop_button_lets_a_command_save(tmp_path, capsys):
    """Oracle: what the command itself tells; it is asked once, and waited for."""
    cells = [cell.source for cell in build.read_source("sd35_lora_tpu").cells]
    [cell] = [source for source in cells if "def run(" in source]
    command = tmp_path / "command"
    command.write_text(f"#!{sys.executable}\n{SAVES}")
    command.chmod(0o755)
    fake = types.SimpleNamespace(executable=str(command))

    def shown(*words, **options):
        print(*words, **options)
        if words == ("started\n",):
            signal.raise_signal(signal.SIGINT)  # what the button sends to a kernel

    space = {"subprocess": subprocess, "sys": fake, "print": shown}
    exec(cell[cell.index("def run(") :], space)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RuntimeError, match="main: exit code 143"):
            space["run"]("main")
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.splitlines()[1:] == ["started", "saved"]


# A command that saves when it is asked to stop, and takes its time.
SAVES = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(60)
"""


def assert_good(notebook):
    """Executed in order, without an error, with pictures."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert None not in counts and counts == sorted(set(counts))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2


def test_sources_say_what_they_need_and_how_long_they_take():
    """Oracle: the first cell; and no cell needs Colab to run."""
    for name in build.NOTEBOOKS:
        cells = build.read_source(name).cells
        assert cells[0].cell_type == "markdown"
        assert "| needs | takes |" in cells[0].source, name
        for cell in cells:
            if "google.colab" in cell.source and cell.cell_type == "code":
                assert "IN_COLAB" in cell.source, name
