"""The workdir: same config or none, one process, files whole or absent."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import workdir
from flowgrpo_jax.runtime.workdir import atomic_write, open_workdir, read_config

CONFIG = {
    "seed": 1,
    "num_iterations": 100,
    "reward": {"geneval": 1.0},
    "train": {"learning_rate": 3e-4, "betas": (0.9, 0.999)},
    "eval": {"every": 10},
    "mesh": {"data": -1},
}
MAY_DIFFER = {"num_iterations", "eval.*", "mesh"}


def changed(**values) -> dict:
    return {**CONFIG, **values}


def test_the_same_config_opens_its_workdir_again(tmp_path):
    """Oracle: invariance; config.json holds the config, tuples as JSON lists."""
    path = tmp_path / "deep" / "run"
    with open_workdir(path, CONFIG) as first:
        assert not first.resumed
    with open_workdir(path, CONFIG) as second:
        assert second.resumed
        assert second.metrics == path / "metrics.jsonl"
        assert second.samples.is_dir()
    assert read_config(path) == json.loads(json.dumps(CONFIG))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(seed=2), "seed: 2: workdir {} holds a run with 1: "),
        (changed(seed=True), "seed: true: workdir {} holds a run with 1: "),
        (
            changed(train={"learning_rate": 1e-4, "betas": [0.9, 0.999]}),
            "train.learning_rate: 0.0001: workdir {} holds a run with 0.0003: ",
        ),
        (
            changed(reward={"ocr": 1.0}),
            "reward.ocr: 1.0: workdir {} holds a run with no such key: ",
        ),
        (
            {key: value for key, value in CONFIG.items() if key != "seed"},
            "seed: no such key: workdir {} holds a run with 1: ",
        ),
    ],
)
def test_another_config_is_refused_and_nothing_is_touched(tmp_path, config, message):
    """Oracle: the rule; the line names the first key, both values and the remedy."""
    open_workdir(tmp_path, CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, config, MAY_DIFFER)
    assert str(error.value).startswith(message.format(tmp_path))
    assert str(error.value).endswith("take another --workdir, or delete this one")
    assert (tmp_path / "config.json").read_bytes() == before
    open_workdir(tmp_path, CONFIG).close()  # the refused call holds no lock


def test_allowed_keys_may_change_on_resume(tmp_path):
    """Oracle: the globs given; a glob covers the keys below it; 1 equals 1.0."""
    open_workdir(tmp_path, CONFIG).close()
    config = changed(num_iterations=200, eval={"every": 5, "n": 2}, mesh={"fsdp": 2})
    config["seed"] = 1.0
    with open_workdir(tmp_path, config, MAY_DIFFER) as run:
        assert run.resumed
    assert read_config(tmp_path)["num_iterations"] == 200


def test_a_run_without_a_readable_config_is_refused(tmp_path):
    """Oracle: the rule; nothing of an unknown run is overwritten."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds a run but no config.json"):
        open_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(UserError, match="config.json: cannot be read"):
        open_workdir(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == '{"seed": 1'
    with pytest.raises(UserError, match="holds no config.json"):
        read_config(tmp_path / "nowhere")


HOLD = """
import sys, time
from flowgrpo_jax.runtime.workdir import open_workdir
held = open_workdir(sys.argv[1], {"seed": 1})
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_share_a_workdir(tmp_path):
    """Oracle: a second process; the kernel frees the lock of a killed one."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    with pytest.raises(UserError, match=f"in use by process {child.pid}"):
        open_workdir(tmp_path, {"seed": 1})
    child.send_signal(signal.SIGKILL)
    child.wait()
    open_workdir(tmp_path, {"seed": 1}).close()


FORK = """
import os, sys, time
from flowgrpo_jax.runtime.workdir import open_workdir
held = open_workdir(sys.argv[1], {"seed": 1})
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.2)
print(child, flush=True)
os._exit(1)
"""


def test_a_worker_that_outlives_the_run_does_not_hold_the_workdir(tmp_path):
    """Oracle: the next start opens it while the forked process still lives."""
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK, tmp_path], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.wait()
    open_workdir(tmp_path, {"seed": 1}).close()
    os.kill(child, signal.SIGKILL)  # ProcessLookupError if it had ended


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, monkeypatch):
    """Oracle: ENOSPC from the file system; the old file stays, no litter."""
    target = tmp_path / "config.json"
    target.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workdir.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on device: what was there"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path):
    """Oracle: ENOTDIR of the kernel (root may write anywhere else)."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir: .*file.*: take another --workdir"):
        open_workdir(tmp_path / "file" / "run", CONFIG)


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Oracle: a handle opened before the write still reads all of the old file."""
    path = tmp_path / "config.json"
    atomic_write(path, "old")
    with path.open() as reader:
        atomic_write(path, "new, and longer")
        assert reader.read() == "old"
    assert path.read_text() == "new, and longer"


def test_written_files_follow_the_umask(tmp_path):
    """Oracle: the mode of a file that `open` makes."""
    atomic_write(tmp_path / "ours", b"bytes")
    (tmp_path / "theirs").write_bytes(b"bytes")
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_mode == theirs.stat().st_mode


def put(path, rows=(), steps=()):
    """What an earlier process recorded."""
    lines = [json.dumps({"iteration": i, "kind": "train"}) + "\n" for i in rows]
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "checkpoints").mkdir(exist_ok=True)
    for step in steps:
        (path / "checkpoints" / str(step) / "state").mkdir(parents=True)


SAVING = changed(checkpoint={"every": 10})


def test_a_shorter_run_cuts_nothing(tmp_path):
    """Oracle: the line; config.json is as it was, and as many are enough."""
    open_workdir(tmp_path, CONFIG).close()
    put(tmp_path, range(20), (10, 20))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, changed(num_iterations=19), MAY_DIFFER)
    assert str(error.value).startswith("num_iterations: 19: workdir")
    assert str(error.value).endswith(
        "has done 20 iterations already: give 20 or more, or take another --workdir"
    )
    assert (tmp_path / "config.json").read_bytes() == before
    open_workdir(tmp_path, changed(num_iterations=20), MAY_DIFFER).close()


@pytest.mark.parametrize(
    "rows, folder, fine",
    [
        (0, True, True),
        (0, False, True),
        (1, False, False),  # the folder is made before the first row is written
        (20, True, True),  # killed while the first checkpoint was written
        (21, True, False),
    ],
)
def test_rows_without_their_checkpoints_are_not_cut(tmp_path, rows, folder, fine):
    """Oracle: when a run saves (train.py), by hand."""
    open_workdir(tmp_path, SAVING).close()
    put(tmp_path, range(rows))
    if not folder:
        (tmp_path / "checkpoints").rmdir()
    if fine:
        open_workdir(tmp_path, SAVING).close()
        return
    with pytest.raises(UserError, match="of its checkpoints there is none: put them"):
        open_workdir(tmp_path, SAVING)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": Infinity}\n3\n[\n')  # for `metrics` to name
    with pytest.raises(UserError, match="of its checkpoints there is none: put them"):
        open_workdir(tmp_path, SAVING)
    (tmp_path / "metrics.jsonl").unlink()  # as told
    open_workdir(tmp_path, SAVING).close()


def test_prompts_that_were_edited_are_noticed(tmp_path):
    """Oracle: the rule; nothing is touched, and the first ones are taken again."""
    first = {"prompts": "aa", "eval.prompts": "bb"}
    open_workdir(tmp_path, CONFIG).close()  # of a version that kept none
    open_workdir(tmp_path, CONFIG, digests=first).close()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    for key in first:
        with pytest.raises(UserError, match=f"^{key}: its prompts are not those that"):
            open_workdir(tmp_path, CONFIG, digests=first | {key: "cc"})
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert after == before and set(after) == {"config.json", "prompts.json"}
    open_workdir(tmp_path, CONFIG, digests=first).close()
    for broken in ("[", "3", "{}", "[" * 100_000):
        (tmp_path / "prompts.json").write_text(broken)
        with pytest.raises(UserError, match="prompts.json: cannot be read"):
            open_workdir(tmp_path, CONFIG, digests=first)


def test_a_finished_run_is_told(tmp_path):
    """Oracle: the newest checkpoint is that of the last iteration."""
    open_workdir(tmp_path, CONFIG).close()
    put(tmp_path, range(20), (10, 20))
    assert workdir.finished_line(tmp_path, 20).startswith("finished: all 20 iterations")
    assert not workdir.finished_line(tmp_path, 21)
    assert not workdir.finished_line(tmp_path, 0)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "", "3", "\0", "[1]"]
)
def test_a_config_json_of_anything_is_one_line(tmp_path, text):
    """Oracle: the line; the file stays."""
    open_workdir(tmp_path, CONFIG).close()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match="^workdir: .*config.json: (cannot be read|holds no)"
    ):
        open_workdir(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == text


def test_a_name_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    """Oracle: the lines, by hand."""
    for name, line in (
        (os.fsdecode(b"a\xff"), "must be named in UTF-8"),
        ("/".join(["x" * 200] * 20), "at most 3,800 bytes"),
        ("a\ud800", r"a.ud800: must be named in UTF-8"),
        ("a\0b", "none of them 0"),
        (
            "x" * 256,
            "file name too long: take another --workdir, or give shorter names",
        ),
    ):
        with pytest.raises(UserError, match=line):
            open_workdir(tmp_path / name, CONFIG)
    assert not list(tmp_path.iterdir())


NAMES = [
    "[a]",
    "a b",
    "a*",
    "?",
    "back\\slash",
    "-x",
    "dot.",
    "%20",
    "ü",
    "a\nb",
    "{x}",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_other_name_is_a_workdir(tmp_path, name):
    """Oracle: the same config opens it again."""
    open_workdir(tmp_path / name, CONFIG).close()
    with open_workdir(tmp_path / name, CONFIG) as again:
        assert again.resumed and again.path == tmp_path / name
    assert os.listdir(tmp_path) == [name]


def test_home_and_relative_names_are_made_absolute_once(tmp_path, monkeypatch):
    """Oracle: the folders; where a reward moves to later does not matter."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert open_workdir("~/run", CONFIG).path == tmp_path / "home" / "run"
    assert open_workdir("run", CONFIG).path == tmp_path / "run"
    assert sorted(os.listdir(tmp_path)) == ["home", "run"]


@pytest.mark.parametrize(
    "number, told",
    [
        (errno.EFBIG, "ulimit -f"),
        (errno.EPERM, "lsattr"),
        (errno.EROFS, "mount that file system"),
        (errno.EACCES, "make it writable"),
    ],
)
def test_each_refusal_of_the_file_system_has_its_remedy(number, told):
    """Oracle: what helps, by hand."""
    with pytest.raises(UserError, match=told), workdir.user_errors("x"):
        raise OSError(number, os.strerror(number))


def test_a_lock_file_of_anything_does_not_matter(tmp_path):
    """Oracle: an invariance."""
    open_workdir(tmp_path, CONFIG).close()
    (tmp_path / ".lock").write_bytes(b"\xff\xfe" * 1000)
    with open_workdir(tmp_path, CONFIG), pytest.raises(UserError, match="in use by"):
        open_workdir(tmp_path, CONFIG)
