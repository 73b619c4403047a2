"""metrics.jsonl and wandb: what is written, and what a resume keeps."""

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.metrics import MetricWriter, read_metrics


def timeless(workdir) -> list[str]:
    """The rows as they stand in the file, less the fields of the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        json.dumps({k: v for k, v in row.items() if not k.startswith("time/")})
        for row in rows
    ]


def run(workdir, start: int, stop: int) -> None:
    """The order of a training loop: evaluate at i, train i, write both."""
    with MetricWriter(workdir, start, tensorboard=False) as writer:
        for i in range(start, stop):
            if i % 2 == 0:
                writer.write(i, {"eval_accuracy": 0.5 + i / 100}, kind="eval")
            writer.write(i, {"reward_avg": np.float32(i) / 3, "kl_loss": 1e-6 * i})


def test_a_row_is_the_iteration_the_kind_and_the_values_in_order(tmp_path):
    """Oracle: the JSON text, written out by hand."""
    scalars = {
        "reward_avg": np.float32(0.1),
        "clipfrac": jnp.asarray(0.25),
        "loss": jnp.asarray(0.1, jnp.bfloat16),
        "group_size": np.int64(24),
        "ratio": 1 / 3,
        "zero": -0.0,
        "broken": float("nan"),
        "huge": -np.inf,
    }
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.write(0, scalars)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.startswith(
        '{"iteration": 0, "kind": "train", "reward_avg": 0.1, "clipfrac": 0.25, '
        '"loss": 0.100097656, "group_size": 24, "ratio": 0.3333333333333333, '
        '"zero": 0.0, "broken": "NaN", "huge": "-Infinity", "time/'
    )
    (row,) = read_metrics(tmp_path)
    assert np.isnan(row["broken"])
    assert row["huge"] == -np.inf
    assert 0.01 < row["time/peak_memory_gb"] < 100


@pytest.mark.parametrize("start", range(8))
def test_a_resumed_run_writes_the_rows_of_an_undisturbed_one(tmp_path, start):
    """Oracle: invariance; killed after iteration 6, started again from `start`."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for workdir in (whole, killed):
        workdir.mkdir()
    run(whole, 0, 10)
    run(killed, 0, 7)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "kind": "tr')  # torn by the kill
    run(killed, start, 10)
    assert timeless(killed) == timeless(whole)


def test_wall_time_goes_on_after_a_resume(tmp_path, monkeypatch):
    """Oracle: a clock that the test holds."""
    now = [100.0]
    monkeypatch.setattr("flowgrpo_jax.runtime.metrics.time.monotonic", lambda: now[0])
    for start, passed in ((0, 5.0), (1, 2.0)):
        with MetricWriter(tmp_path, start, tensorboard=False) as writer:
            now[0] += passed
            writer.write(start, {})
        now[0] += 1000
    assert [row["time/wall"] for row in read_metrics(tmp_path)] == [5.0, 7.0]


def test_a_full_disk_leaves_no_torn_row(tmp_path):
    """Oracle: the file size limit of the kernel, reached inside the second row."""
    script = """
import resource, sys
from flowgrpo_jax.runtime.metrics import MetricWriter
writer = MetricWriter(sys.argv[1], 0, tensorboard=False)
writer.write(0, {"x": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (120, 120))
writer.write(1, {"x": 2})
"""
    child = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"UserError: workdir: {tmp_path}/metrics.jsonl: file too large" in (
        child.stderr
    )
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.startswith(b'{"iteration": 0') and content.count(b"\n") == 1
    assert content.endswith(b"}\n")


def test_a_file_that_was_removed_is_put_back(tmp_path, capsys):
    """Oracle: the rows of a run that nobody has disturbed."""
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.write(0, {"a": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        writer.write(1, {"a": 2.0})
        writer.write(2, {"a": 3.0})
    assert [row["a"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0]
    assert "put back with its 1 rows" in capsys.readouterr().err


def test_mistakes_are_told(tmp_path):
    """Oracle: the rules; numbers only, reserved names, damaged files."""
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="loss: shape \\(2,\\)"):
            writer.write(0, {"loss": np.zeros(2)})
        with pytest.raises(ValueError, match="reserved metric names: \\['kind'\\]"):
            writer.write(0, {"kind": 1})
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []
    row = '{"iteration": %d, "kind": "train"}\n'
    (tmp_path / "metrics.jsonl").write_text(row % 0 + "noise\n" + row % 2)
    with pytest.raises(UserError, match="metrics.jsonl: line 2: not a row"):
        MetricWriter(tmp_path, 3, tensorboard=False)


GARBAGE = [
    b"noise",
    b"",
    b"\0\xff",
    b"[" * 100_000,
    b"9" * 5000,
    b"3",
    b"{}",
    b'{"iteration": 0}',
    b'{"iteration": Infinity, "kind": "train"}',
    b'{"iteration": -1, "kind": "train"}',
    b'{"iteration": true, "kind": "train"}',
    b'{"iteration": 1, "kind": "train", "loss": "much"}',
    b'{"iteration": 1, "kind": "train", "loss": [1]}',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda line: str(line[:20]))
def test_a_broken_line_is_named_or_written_again(tmp_path, garbage):
    """Oracle: below the checkpoint one line that names it, from there on nothing."""
    run(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    whole = timeless(tmp_path)
    path.write_bytes(b"\n".join([*lines[:2], garbage, *lines[2:]]) + b"\n")
    before = path.read_bytes()
    for read in (
        lambda: read_metrics(tmp_path),
        lambda: MetricWriter(tmp_path, 4, tensorboard=False),
    ):
        with pytest.raises(UserError, match="line 3: not a row of metrics: delete"):
            read()
    assert path.read_bytes() == before
    run(tmp_path, 1, 4)  # a checkpoint that is older
    assert timeless(tmp_path) == whole


def test_the_remedy_for_a_broken_line_leaves_no_hole(tmp_path):
    """Oracle: what is told, done; the file is that of an undisturbed run."""
    run(tmp_path, 0, 6)
    whole = timeless(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[-2] = "noise"  # iteration 4, evaluated
    path.write_text("\n".join(lines) + "\n")
    for step in (2, 5):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
    with pytest.raises(UserError, match="delete it and checkpoints/5: the run goes on"):
        MetricWriter(tmp_path, 5, tensorboard=False)
    path.write_text("\n".join(line for line in lines if line != "noise") + "\n")
    run(tmp_path, 2, 6)
    assert timeless(tmp_path) == whole


def test_rows_that_are_written_again_are_counted(tmp_path):
    """Oracle: the rows of iterations 2 and 3, by hand: train, eval, train."""
    run(tmp_path, 0, 4)
    with MetricWriter(tmp_path, 2, tensorboard=False) as writer:
        assert writer.rewritten == 3
    with MetricWriter(tmp_path, 2, tensorboard=False) as writer:
        assert writer.rewritten == 0


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path):
    """Oracle: EISDIR of the kernel."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: is a directory"):
        MetricWriter(tmp_path, 0, tensorboard=False)


class FakeWandb(types.ModuleType):
    """Records the calls; the real one needs an account."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0
        self.Image = lambda pixels, caption: (caption, pixels.dtype, pixels.shape)
        self.url = "https://wandb.example/run"

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def define_metric(self, *arguments, **options):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """Oracle: the calls wandb gets; the id is that of the first start."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 5):
        options = {"wandb": {"project": "sprites"}, "config": {"seed": 3}}
        with MetricWriter(tmp_path, start, tensorboard=False, **options) as writer:
            writer.write(start, {"reward_avg": 0.5})
            picture = {"eval_images": np.zeros((4, 4, 3))}
            writer.images(start, picture, ["a dog | mine: 0.93"])
    first, second = fake.inits
    assert first == second
    assert first["project"] == "sprites" and first["resume"] == "allow"
    assert first["config"] == {"seed": 3}
    row = fake.logged[0]
    assert row["iteration"] == 0 and row["reward/reward_avg"] == 0.5
    assert fake.logged[3] == {
        "iteration": 5,
        "eval_images": [("a dog | mine: 0.93", np.dtype("uint8"), (4, 4, 3))],
    }
    assert fake.finished == 2
    assert (tmp_path / "wandb_url.txt").read_text() == fake.url


def test_wandb_asked_for_but_missing_is_one_line(tmp_path, monkeypatch):
    """Oracle: an import that fails."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb: asked for but not installed"):
        MetricWriter(tmp_path, 0, tensorboard=False, wandb={})
