"""Makes the notebooks of this folder from their sources, with outputs.

    python -m colabs.build               all of them
    python -m colabs.build how_it_works

A source is Python in cells (py:percent, as jupytext writes it). It is executed from top
to bottom in an empty folder and written beside itself as NAME.ipynb, which is never
edited by hand: tests/colabs holds that both say the same. Needs the extra `notebooks`,
and `test` for sd35_lora_tpu, whose outputs are those of a tiny random pipeline.
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
NOTEBOOKS = ("quickstart", "how_it_works", "your_reward", "sd35_lora_tpu")
_SECONDS = 3600  # the most that one cell may take
# XLA's lines about a program that compiles for minutes: the machine was busy.
_SLOW_COMPILE = re.compile(
    r"^(E\d{4} .*slow_operation_alarm\.cc.*\n\n?|\*{32}\n|\[Compiling module .*\n)",
    re.MULTILINE,
)
# What makes sd35_lora_tpu run on the pipeline of the tests, of 64 x 64 pixels.
TINY_PIPELINE = {
    "MODEL": "tiny_pipeline",
    "REWARD": "jpeg_compressibility",
    "RESOLUTION": 64,
    "TRIAL, NUM_ITERATIONS": (1, 2),
    "MORE": [
        "--config.max_sequence_length=16",
        "--config.prompts_per_iteration=2",
        "--config.group_size=8",
        "--config.microbatch=8",
        "--config.sample.num_steps=6",
        "--config.sample.eval_num_steps=4",
        "--config.eval.sde=false",
        "--config.train.learning_rate=1e-2",
        "--config.log.tensorboard=false",
        "--config.dtype=float32",
        "--config.remat=none",  # it compiles faster
    ],
    "COMPARED": [
        "--max_prompts=2",
        "--num_images=2",
        "--num_steps=4",
        "--guidance_scale=1",
    ],
}


def read_source(name: str) -> NotebookNode:
    """The cells of a notebook's source, without outputs."""
    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws another one each time
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    return notebook


def execute(
    name: str,
    parameters: Mapping[str, Any],
    folder: Path,
    environment: Mapping[str, str] = os.environ,
) -> NotebookNode:
    """The notebook with its outputs, executed in `folder`; a cell that fails raises.

    `parameters` take the place of values in the cell that is tagged so, as papermill
    does it. KeyError for one that this cell does not set.
    """
    notebook = read_source(name)
    cells = notebook.cells
    [place] = [n for n, cell in enumerate(cells) if "parameters" in _tags(cell)]
    for key in parameters:
        if not re.search(rf"^{key} = ", cells[place].source, re.MULTILINE):
            raise KeyError(f"{name}: {key} is no parameter")
    lines = [f"{key} = {value!r}" for key, value in parameters.items()]
    given = nbformat.v4.new_code_cell("\n".join(lines), id="given-parameters")
    notebook.cells = [*cells[: place + 1], given, *cells[place + 1 :]]
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    )
    client.execute(env=dict(environment))
    notebook.cells = [cell for cell in notebook.cells if cell.id != given.id]
    return notebook


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def write(name: str, folder: Path) -> Path:
    """Execute a notebook in `folder` and write it without the paths of this machine."""
    parameters: Mapping[str, Any] = {}
    if name == "sd35_lora_tpu":
        from tests.parity.tiny_sd3 import write_pipeline

        write_pipeline(folder / TINY_PIPELINE["MODEL"])
        parameters = TINY_PIPELINE
    notebook = execute(name, parameters, folder)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = _SLOW_COMPILE.sub("", output.text)
    text = nbformat.writes(notebook)
    path = HERE / f"{name}.ipynb"
    for here in (folder, HERE.parent):
        text = text.replace(f"{here}/", "")
    path.write_text(text + "\n")
    return path


if __name__ == "__main__":
    for wanted in sys.argv[1:] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as empty:
            print(write(wanted, Path(empty)), flush=True)
