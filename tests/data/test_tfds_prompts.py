"""Prompt sets through TFDS; preparing one takes a second, importing TFDS two."""

import shutil
import subprocess
import sys

import pytest

from flowgrpo_jax.data.geneval_grammar import COCO, TASKS, Vocabulary
from flowgrpo_jax.data.geneval_prompts import TEST_NUM, TEST_SEED, generate
from flowgrpo_jax.data.prompt_sets import PROMPT_SETS, PromptSet
from flowgrpo_jax.data.tfds_prompts import load
from flowgrpo_jax.errors import UserError

SHAPES = PromptSet(
    "shapes",
    Vocabulary(("circle", "square", "ring"), ("red", "blue", "black"), ()),
    num_train=200,
    test_fraction={tag: 0.5 for tag in TASKS},
)

# For a new process: the first argument is `data_dir`; with a second one the process
# kills itself in the middle of writing.
SCRIPT = """
import os, sys
from flowgrpo_jax.data import prompt_sets, tfds_prompts
assert "tensorflow_datasets" not in sys.modules
coco = prompt_sets.PromptSet("coco", prompt_sets.COCO, num_train=100)
if sys.argv[2:]:
    from flowgrpo_jax.data.tfds_builder import GenevalPrompts
    def dying(self, prompts, generate=GenevalPrompts._generate_examples):
        for number, example in enumerate(generate(self, prompts)):
            if number == 200:  # within the second split
                os._exit(9)
            yield example
    GenevalPrompts._generate_examples = dying
print(len(tfds_prompts.load(coco, "train", sys.argv[1])))
assert "tensorflow" not in sys.modules
"""


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_reads_back_what_was_generated(tmp_path):
    """Oracle: the generator itself, in order, types and metadata included."""
    for split in ("train", "test"):
        assert load(SHAPES, split, tmp_path) == SHAPES.generate(split)
    first = load(SHAPES, "train", tmp_path)[0]
    assert isinstance(first.text, str) and isinstance(first.index, int)


def test_a_killed_preparation_leaves_nothing_to_read(tmp_path):
    """Oracle: a process killed while writing, then a second one that succeeds.

    The second also shows that TensorFlow is never imported, nor TFDS before load.
    """
    killed = _run(tmp_path, "die")
    assert killed.returncode == 9, killed.stderr
    assert any(tmp_path.rglob("incomplete.*"))
    again = _run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "100"


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    """Oracle: a second preparation that runs to its end inside the first."""
    generate = PromptSet.generate
    inner = []

    def overtaken(self, split):
        if not inner:
            inner.append("started")
            inner.append(load(SHAPES, "test", tmp_path))
        return generate(self, split)

    monkeypatch.setattr(PromptSet, "generate", overtaken)
    assert load(SHAPES, "test", tmp_path) == inner[1] == generate(SHAPES, "test")


def _damage(name, change):
    def at(folder):
        [path] = folder.rglob(name)
        path.write_bytes(change(path.read_bytes()))

    return at


@pytest.mark.parametrize(
    "damage",
    [
        _damage("*test.array_record*", lambda data: data[:20_000]),
        _damage("*test.array_record*", lambda data: b""),
        _damage("*test.array_record*", lambda data: data[:100] + b"x" + data[101:]),
        _damage("dataset_info.json", lambda data: b"{"),
        _damage("dataset_info.json", lambda data: b"[]"),
        lambda folder: next(folder.rglob("*test.array_record*")).unlink(),
    ],
)
def test_a_damaged_copy_is_named(tmp_path, damage):
    """Oracle: one line with the folder that is to be deleted; without it all is well."""
    wanted = load(SHAPES, "test", tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match="is damaged .*: delete this folder") as caught:
        load(SHAPES, "test", tmp_path)
    line = str(caught.value)
    folder = tmp_path / "geneval_prompts" / SHAPES.config_name
    assert "\n" not in line and str(folder) in line
    shutil.rmtree(folder)
    assert load(SHAPES, "test", tmp_path) == wanted


def test_the_first_use_is_one_line(tmp_path, capfd):
    """Oracle: what is printed, by TFDS and its bars too; nothing at the second use."""
    load(SHAPES, "test", tmp_path)
    told = capfd.readouterr()
    assert told.out.startswith("preparing shapes prompts in ") and not told.err
    assert told.out.count("\n") == 1
    load(SHAPES, "test", tmp_path)
    assert capfd.readouterr().out == ""


def test_a_changed_description_has_other_files():
    """Oracle: names differ when and only when descriptions do."""
    other = PromptSet(
        "shapes", SHAPES.vocabulary, num_train=201, test_fraction=SHAPES.test_fraction
    )
    assert other.config_name != SHAPES.config_name
    assert SHAPES.config_name.startswith("shapes-")
    assert PROMPT_SETS["coco"].config_name == "coco"
    assert PromptSet("coco", COCO, num_train=5).config_name != "coco"


def test_coco_set_is_the_benchmark():
    """Oracle: generate() with the benchmark's constants."""
    assert PROMPT_SETS["coco"].generate("test") == generate(
        COCO, "test", TEST_NUM, TEST_SEED
    )


def test_bad_names(tmp_path):
    """Oracle: the message names the value and the allowed ones."""
    with pytest.raises(UserError, match=r"^prompts: cocoa: must be one of coco$"):
        load("cocoa", "train", tmp_path)
    with pytest.raises(UserError, match="^prompts: split dev: must be one of"):
        load("coco", "dev", tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """Oracle: the line names the variable that tells another one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^prompts: shapes: .*file.*TFDS_DATA_DIR"):
        load(SHAPES, "test", tmp_path / "file")
