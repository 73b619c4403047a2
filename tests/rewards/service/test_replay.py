"""Scores that are kept: nothing is asked twice, whatever is killed meanwhile."""

import contextlib
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.service.replay import Replay

IMAGES = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
PROMPTS = [Prompt("a"), Prompt("b"), Prompt("a"), Prompt("b", {"count": 2})]


@pytest.fixture
def asked():
    return []


@pytest.fixture
def reward(asked):
    def measure(images, prompts):
        asked.append(len(images))
        return {"paid": images.mean(axis=(1, 2, 3)), "one": np.ones(len(images))}

    return measure


def replay(reward, path, **options):
    return Replay("paid", reward, path, options)


def test_a_second_process_asks_for_nothing(reward, asked, tmp_path):
    """Oracle: counts of calls, and the first scores, bit for bit."""
    first = replay(reward, tmp_path / "kept.sqlite")
    before = first(IMAGES[:3], PROMPTS[:3])
    del first
    second = replay(reward, tmp_path / "kept.sqlite", retries=9)  # asks the same
    after = second(IMAGES, PROMPTS)
    assert asked == [3, 1]
    for name in before:
        np.testing.assert_array_equal(before[name], after[name][:3])
        np.testing.assert_array_equal(after[name], reward(IMAGES, PROMPTS)[name])


def test_what_is_asked_is_the_key(reward, asked, tmp_path):
    """Oracle: counts; another prompt, record, pixel or template is another question."""
    kept = replay(reward, tmp_path / "kept.sqlite")
    kept(IMAGES[:1], PROMPTS[:1])
    kept(np.repeat(IMAGES[:1], 2, axis=0), [Prompt("b"), Prompt("b")])  # asked once
    kept(IMAGES[:1], [Prompt("a", {"count": 2})])
    kept(np.nextafter(IMAGES[:1], np.float32(1)), PROMPTS[:1])
    kept(IMAGES[:1], PROMPTS[:1])
    assert asked == [1, 1, 1, 1]
    del kept
    replay(reward, tmp_path / "kept.sqlite", template="?")(IMAGES[:1], PROMPTS[:1])
    assert len(asked) == 5


def test_a_killed_run_keeps_what_was_answered(reward, asked, tmp_path):
    """Oracle: the contract; a process killed between two calls."""
    program = textwrap.dedent(f"""
        import numpy as np
        from flowgrpo_jax.data.prompts import Prompt
        from flowgrpo_jax.rewards.service.replay import Replay
        measure = lambda images, prompts: {{"paid": images.mean(axis=(1, 2, 3))}}
        kept = Replay("paid", measure, {str(tmp_path / "kept")!r}, {{}})
        for number in range(10**9):
            kept(np.full((1, 2, 2, 3), number, np.float32), [Prompt("a")])
            print(number, flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            if int(line) == 20:
                break
        run.kill()
    images = np.arange(21, dtype=np.float32)[:, None, None, None] * np.ones((2, 2, 3))
    kept = replay(reward, tmp_path / "kept")
    scores = kept(images.astype(np.float32), [Prompt("a")] * 21)["paid"]
    np.testing.assert_array_equal(scores, np.arange(21))
    assert not asked


def test_what_is_no_number_is_asked_again(asked, tmp_path):
    """Oracle: a count; NaN is not kept."""

    def sometimes(images, prompts):
        asked.append(0)
        return {"paid": np.where(images[:, 0, 0, 0] < 2, np.nan, 1)}

    assert np.isnan(replay(sometimes, tmp_path / "kept")(IMAGES, PROMPTS)["paid"]).all()
    replay(sometimes, tmp_path / "kept")(IMAGES, PROMPTS)
    assert len(asked) == 2


def test_in_a_config(reward, asked, tmp_path, monkeypatch):
    """Oracle: a count, also of a run beside it; a file of something else is one line."""
    monkeypatch.setitem(registry.REWARDS, "paid", lambda context: reward)
    options = {"paid": {"replay": str(tmp_path / "x" / "kept")}}
    made = registry.make("paid", Context(options=options))
    made(IMAGES, PROMPTS)
    made(IMAGES, PROMPTS)
    assert asked == [4]
    registry.make("paid", Context(options=options))(IMAGES, PROMPTS)
    assert asked == [4]
    (tmp_path / "notes").write_text("dear diary\n")
    with pytest.raises(UserError, match="notes: file is not a database: take another"):
        replay(reward, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "dear diary\n"


def test_a_database_of_another_program(reward, tmp_path):
    """Oracle: the line, by hand, and the file as it was."""
    path = tmp_path / "study.db"
    with contextlib.closing(sqlite3.connect(path)) as study, study:
        study.execute("CREATE TABLE scores (trial INTEGER)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="study.db: holds tables of another program: "):
        replay(reward, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", ["a\0b", 5, ["a"]])
def test_paths_that_are_none(reward, path):
    with pytest.raises(UserError, match="^reward_options.paid.replay: "):
        replay(reward, path)


def test_a_disk_that_is_full_tears_nothing(reward, asked, tmp_path, full_disk):
    """Oracle: the line, by hand; what was kept before is still known."""
    kept = replay(reward, tmp_path / "kept")
    kept(IMAGES[:2], PROMPTS[:2])
    many = np.random.default_rng(1).random((2000, 2, 2, 3), np.float32)
    with (
        full_disk(),
        pytest.raises(
            UserError, match="^reward_options.paid.replay: .* full: free some space"
        ),
    ):
        kept(many, [Prompt("a")] * 2000)
    kept(IMAGES[:2], PROMPTS[:2])
    assert asked == [2, 2000]
    kept(many, [Prompt("a")] * 2000)
    assert asked == [2, 2000, 2000]


def test_home_is_the_home_folder(reward, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    replay(reward, "~/kept.sqlite")
    assert (tmp_path / "kept.sqlite").exists()
