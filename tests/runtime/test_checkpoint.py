"""Checkpoints: what is restored, and what survives kills, full disks and damage."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import checkpoint
from flowgrpo_jax.runtime.checkpoint import Checkpointer, Schedule, _disk_failure


@struct.dataclass
class State:
    """A stand-in for the train state: nested containers and every kind of leaf."""

    params: dict
    moments: tuple
    key: jax.Array
    table: np.ndarray
    iteration: int


def state(value: float) -> State:
    return State(
        params={"dense": {"kernel": jnp.full((64, 32), value)}, "empty": {}},
        moments=(None, jnp.full((3,), value, jnp.bfloat16)),
        key=jax.random.fold_in(jax.random.key(0), int(value)),
        table=np.full((5,), value),
        iteration=int(value),
    )


def assert_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_round_trip_keeps_values_types_and_the_last_steps(tmp_path):
    """Oracle: the saved pytree itself, leaf by leaf (values, types, PRNG key)."""
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        assert checkpointer.latest() is None
        for step in (1, 2, 3):
            checkpointer.save(step, state(step))
        checkpointer.save(3, state(4))  # there already: left alone
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3]
        assert_equal(checkpointer.restore(state(0)), state(3))
        assert_equal(checkpointer.restore(state(0), step=2), state(2))
        only = checkpointer.restore({"table": np.zeros(5)}, partial=True)
        np.testing.assert_array_equal(only["table"], state(3).table)


def test_saved_values_are_those_of_the_call(tmp_path):
    """Oracle: invariance; donating or overwriting after `save` changes nothing."""
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    weights, table = jnp.ones((2000, 2000)), np.ones(3_000_000)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"weights": weights, "table": table})
        table[:] = -1
        jax.block_until_ready(overwrite(weights))
        checkpointer.wait()
        restored = checkpointer.restore(
            {"weights": jax.ShapeDtypeStruct((2000, 2000), "float32"), "table": table}
        )
    assert float(restored["weights"].min()) == 1
    assert restored["table"].min() == 1


RESHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from flowgrpo_jax.runtime.checkpoint import Checkpointer
auto = AxisType.Auto
line = jax.make_mesh((4,), ("data",), axis_types=(auto,))
square = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(auto, auto))
weights = jax.device_put(
    jnp.arange(64.0).reshape(8, 8), NamedSharding(line, PartitionSpec("data"))
)
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"weights": weights})
    assert checkpointer.latest() in (None, 1), "only what is finished counts"
    for spec in (PartitionSpec("fsdp", "data"), PartitionSpec()):
        wanted = NamedSharding(square, spec)
        like = {"weights": jax.ShapeDtypeStruct((8, 8), "float32", sharding=wanted)}
        restored = checkpointer.restore(like)["weights"]
        assert restored.sharding == wanted
        np.testing.assert_array_equal(restored, weights)
"""


def test_restores_to_the_sharding_that_is_asked_for(tmp_path):
    """Oracle: the requested shardings on 4 devices, and the values saved."""
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", RESHARDED, tmp_path],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
    )


KILLED = """
import sys
import jax.numpy as jnp
from flowgrpo_jax.runtime.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=3)
for step in range(1, 1000):
    checkpointer.save(step, {"weights": jnp.full((1000, 500), float(step))})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 7, 20, 45])
def test_sigkill_during_a_save_leaves_a_whole_checkpoint(tmp_path, delay_ms):
    """Oracle: invariance; the newest finished step holds exactly its own values."""
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True
    )
    for _ in range(4):  # the fourth save has begun, so the third is on disk
        child.stdout.readline()
    time.sleep(delay_ms / 1000)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        step = checkpointer.latest()
        assert step >= 3
        restored = checkpointer.restore({"weights": np.zeros((1000, 500), "float32")})
        assert set(np.unique(restored["weights"])) == {step}
        checkpointer.save(step + 1, restored)
    assert not list(tmp_path.glob("*tmp*")), "leftovers of the kill are cleaned up"


FULL_DISK = """
import resource, sys
import numpy as np
from flowgrpo_jax.runtime.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=3)
weights = np.random.default_rng(0).normal(size=300_000)
checkpointer.save(1, {"weights": weights})
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
checkpointer.save(2, {"weights": weights})
checkpointer.wait()
"""


def test_a_save_that_fails_is_one_line_and_costs_no_earlier_checkpoint(tmp_path):
    """Oracle: the file size limit of the kernel; step 1 restores bit for bit."""
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert "UserError: checkpoint: " + str(tmp_path) in child.stderr
    assert "ERROR" not in child.stderr, "orbax must not log on the terminal"
    weights = np.random.default_rng(0).normal(size=300_000)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        restored = checkpointer.restore({"weights": weights})
    np.testing.assert_array_equal(restored["weights"], weights)


def test_file_system_failures_are_told_from_mistakes_in_the_program():
    """Oracle: the messages tensorstore and the OS give for ENOSPC and EACCES."""
    full = "RESOURCE_EXHAUSTED: Failed to write: No space left on device"
    assert _disk_failure(ValueError(full)) == ("disk full", "free some space")
    assert _disk_failure(OSError(28, "No space left on device"))[0] == "disk full"
    assert _disk_failure(PermissionError(13, "Permission denied", "x")) == (
        "permission denied",
        "make it writable",
    )
    large = "OUT_OF_RANGE: Failed to write: File too large [os_error_code='27']"
    reason, remedy = _disk_failure(ValueError(large))
    assert reason == "file too large" and "ulimit -f" in remedy
    gone = 'NOT_FOUND: Error writing "ema/0.0" in OCDBT database at local file "x"'
    assert _disk_failure(ValueError(gone))[0] == "no such file or directory"
    assert _disk_failure(ValueError("Cannot save arrays with zero size")) is None


def damaged(folder: Path):
    """Every file of a checkpoint in turn: deleted, cut short, one byte changed."""
    files = sorted(path for path in folder.rglob("*") if path.stat().st_size)
    for path in (path for path in files if path.is_file()):
        good = path.read_bytes()
        middle = len(good) // 2
        flipped = bytes([good[middle] ^ 255])
        for bad in (None, good[:middle], good[:middle] + flipped + good[middle + 1 :]):
            path.write_bytes(bad) if bad is not None else path.unlink()
            yield path.relative_to(folder)
            path.write_bytes(good)


def test_a_damaged_checkpoint_names_its_folder_and_the_remedy(tmp_path, capfd):
    """Oracle: invariance; each damage raises the line or leaves the values exact."""
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step))
        checkpointer.wait()
        for name in damaged(tmp_path / "2"):
            try:
                restored = checkpointer.restore(state(0))
            except UserError as error:
                assert f"{tmp_path / '2'}: cannot be restored" in str(error)
                assert "delete this folder to fall back to step 1" in str(error)
                assert "\n" not in str(error)
            else:  # orbax's own notes outside `state`
                assert name.parts[0] not in ("state", "checksums.json"), name
                assert_equal(restored, state(2))
        shutil.rmtree(tmp_path / "2" / "state")
        with pytest.raises(UserError, match="is missing"):
            checkpointer.restore(state(0))
    assert capfd.readouterr() == ("", "")


def test_a_state_of_another_shape_and_missing_steps_are_refused(tmp_path):
    """Oracle: the rule; what is asked for must be what was saved."""
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpointer.restore(state(0))
        checkpointer.save(1, state(1))
        checkpointer.wait()
        with pytest.raises(UserError, match="step 7: .* has \\[1\\]"):
            checkpointer.restore(state(0), step=7)
        with pytest.raises(UserError, match="where \\(6,\\) is wanted"):
            checkpointer.restore(state(0).replace(table=np.zeros(6)))
        with pytest.raises(UserError, match="from the beginning"):
            checkpointer.restore({"other": np.zeros(6)})
    with pytest.raises(UserError, match="no such folder"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    with pytest.raises(UserError, match="checkpoint.keep: 0: at least 1"):
        Checkpointer(tmp_path, keep=0)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"table": np.zeros(5, np.float32)}, "table: float64 where float32 is wanted"),
        ({"table": np.zeros(5, np.int32)}, "table: float64 where int32 is wanted"),
        ({"table": np.zeros((5, 1))}, "table: an array of shape"),
        ({"other": np.zeros(5)}, "other is not in it"),
        ({"other": jnp.zeros(5)}, "other is not in it"),
        ({"params": {"dense": {"bias": jnp.zeros(2)}}}, "params/dense/bias is not in"),
        ({"params": {"dense": jnp.zeros(2)}}, "params/dense is not in it"),
        ({"table": {"inner": np.zeros(5)}}, "table/inner is not in it"),
        ({"moments": (None, jnp.zeros(3, jnp.float16))}, "moments/1: bfloat16 where"),
        ({"key": jnp.zeros(2, jnp.int32)}, "key: uint32 where int32"),
        ({"key": jax.random.key(0, impl="rbg")}, "key: an array of shape"),
        ({"iteration": np.float32(1.5)}, "iteration: int64 where float32"),
    ],
)
@pytest.mark.parametrize("partial", [True, False])
def test_what_was_not_saved_so_is_named(tmp_path, change, line, partial):
    """Oracle: the rule; orbax would cast, or give back what was asked for as it is."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1.0))
        checkpointer.wait()
        with pytest.raises(UserError, match=re.escape(line)):
            checkpointer.restore(
                change if partial else vars(state(0.0)) | change, partial=partial
            )


@pytest.mark.parametrize(
    "sums",
    [
        *("{}", "[]", "3", "null", '"x"', "[" * 100_000, '{"../1/checksums.json": []}'),
        *(
            '{"state/a": [0, 0]}',
            '{"\\u0000": [1, 2]}',
            '{"' + "x" * 300 + '": [1, 2]}',
        ),
        *("\\xff", "1" * 5000),
    ],
)
def test_checksums_that_are_none_are_refused(tmp_path, sums):
    """Oracle: one line that names the folder; nothing is restored unchecked."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.wait()
        (tmp_path / "1" / "checksums.json").write_bytes(sums.encode("latin-1"))
        with pytest.raises(UserError, match=f"{tmp_path / '1'}: cannot be restored"):
            checkpointer.restore(state(0))


@pytest.mark.parametrize(
    "about", ["1", "[" * 100_000, "{", "", '"x"', "{}", '{"a": 1}']
)
def test_what_orbax_notes_of_a_step_may_be_damaged_too(tmp_path, about):
    """Oracle: one line that names the folder, or the values as they were."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1))
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text(about)
    try:
        with Checkpointer(tmp_path, read_only=True) as checkpointer:
            restored = checkpointer.restore(state(0))
    except UserError as error:
        assert f"checkpoint: {tmp_path / '1'}: " in str(error)
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert_equal(restored, state(1))


def test_files_of_others_in_a_checkpoint(tmp_path):
    """Oracle: the rule; those of a file manager are let be, any other one is named."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.wait()
        (tmp_path / "1" / "state" / ".DS_Store").touch()
        assert_equal(checkpointer.restore(state(0)), state(1))
        (tmp_path / "1" / "state" / "d" / "stray").write_text("x")
        with pytest.raises(UserError, match="state/d/stray is not of this checkpoint"):
            checkpointer.restore(state(0))


def test_a_checkpoint_every_so_many_iterations_and_minutes():
    """Oracle: a clock that the test holds, 100 s an iteration; counting by hand."""
    now = [0.0]

    def saved(every: int, minutes: float):
        now[0] = 0.0
        schedule = Schedule(every, minutes, lambda: now[0])
        at = []
        for iteration in range(20):
            if iteration and schedule.due(iteration):
                at.append(iteration)
            now[0] += 100
        return at

    assert saved(7, 0.0) == [7, 14]
    assert saved(50, 5.0) == [3, 6, 9, 12, 15, 18]
    assert saved(7, 8.0) == [5, 7, 12, 14, 19]
    assert saved(1, 1.0) == list(range(1, 20))


def test_read_only_leaves_a_save_in_flight_alone(tmp_path):
    """Oracle: invariance; another process's temporary folder stays."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path, read_only=True) as reader:
        assert_equal(reader.restore(state(0)), state(1))
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()


@pytest.mark.parametrize("name", ["[a]", "back\\slash", "a*b", "a?b", "plain"])
def test_a_folder_is_no_pattern(tmp_path, name):
    """Oracle: what was saved, read by another checkpointer, beside a folder alike."""
    for value, folder in ((7, "aXb"), (1, name)):
        with Checkpointer(tmp_path / folder / "checkpoints") as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, state(value + step))
    with Checkpointer(tmp_path / name / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        assert_equal(checkpointer.restore(state(0)), state(3))
    open_files = [
        os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()
    ]
    assert not [path for path in open_files if path.startswith(str(tmp_path))]


def test_orbax_still_uses_the_names_that_are_relied_on(tmp_path, monkeypatch):
    """Oracle: orbax's own files; neither name is part of its public interface."""
    seal, in_flight = Checkpointer._seal, []

    def sealed(self):
        in_flight.extend(path.name for path in self.directory.iterdir())
        seal(self)

    monkeypatch.setattr(Checkpointer, "_seal", sealed)
    checkpoints = Checkpointer(tmp_path / "run")
    try:
        checkpoints.save(7, {"x": jnp.ones(3)})
        checkpoints.wait()
    finally:
        assert any(name.startswith("7.orbax-checkpoint-tmp") for name in in_flight), (
            "orbax names a step that is being saved in another way: "
            f"{in_flight}: change the pattern in Checkpointer._seal"
        )
        checkpoints.close()
    names = sorted(path.name for path in (tmp_path / "run" / "7").iterdir())
    assert checkpoint._ABOUT in names, (
        f"orbax's file about a step has another name: {names}: change checkpoint._ABOUT"
    )
