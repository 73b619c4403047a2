"""Scores that are kept: nothing is asked twice, and a crash costs one line at most."""

import errno
import os

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
    first = replay(reward, tmp_path / "kept.jsonl")
    before = first(IMAGES[:3], PROMPTS[:3])
    del first
    second = replay(reward, tmp_path / "kept.jsonl", retries=9)  # asks the same
    after = second(IMAGES, PROMPTS)
    assert asked == [3, 1]
    for name in before:
        np.testing.assert_array_equal(before[name], after[name][:3])
        np.testing.assert_array_equal(after[name], reward(IMAGES, PROMPTS)[name])


def test_what_is_asked_is_the_key(reward, asked, tmp_path):
    """Oracle: counts; another prompt, record, pixel or template is another question."""
    kept = replay(reward, tmp_path / "kept.jsonl")
    kept(IMAGES[:1], PROMPTS[:1])
    kept(np.repeat(IMAGES[:1], 2, axis=0), [Prompt("b"), Prompt("b")])  # asked once
    kept(IMAGES[:1], [Prompt("a", {"count": 2})])
    kept(np.nextafter(IMAGES[:1], np.float32(1)), PROMPTS[:1])
    kept(IMAGES[:1], PROMPTS[:1])
    assert asked == [1, 1, 1, 1]
    del kept
    replay(reward, tmp_path / "kept.jsonl", template="?")(IMAGES[:1], PROMPTS[:1])
    assert len(asked) == 5


def test_a_line_that_a_crash_has_cut(reward, asked, tmp_path):
    """Oracle: a file cut at every kind of place; whole lines stay, and it goes on."""
    path = tmp_path / "kept.jsonl"
    kept = replay(reward, path)
    whole = kept(IMAGES, PROMPTS)
    del kept
    data = path.read_bytes()
    for cut in (len(data) - 1, len(data) - 40, 5):
        path.write_bytes(data[:cut])
        kept = replay(reward, path)
        np.testing.assert_array_equal(kept(IMAGES, PROMPTS)["paid"], whole["paid"])
        del kept
        assert sorted(path.read_bytes().splitlines()) == sorted(data.splitlines())
    assert asked == [4, 1, 1, 4]


def test_what_is_no_number_is_asked_again(asked, tmp_path):
    """Oracle: a count; NaN is not kept."""

    def sometimes(images, prompts):
        asked.append(0)
        return {"paid": np.where(images[:, 0, 0, 0] < 2, np.nan, 1)}

    assert np.isnan(replay(sometimes, tmp_path / "kept")(IMAGES, PROMPTS)["paid"]).all()
    replay(sometimes, tmp_path / "kept")(IMAGES, PROMPTS)
    assert len(asked) == 2


def test_in_a_config(reward, asked, tmp_path, monkeypatch):
    """Oracle: a count; a file of something else, or in use, is one line."""
    monkeypatch.setitem(registry.REWARDS, "paid", lambda context: reward)
    options = {"paid": {"replay": str(tmp_path / "x" / "kept")}}
    made = registry.make("paid", Context(options=options))
    made(IMAGES, PROMPTS)
    made(IMAGES, PROMPTS)
    assert asked == [4]
    with pytest.raises(
        UserError, match="^reward_options.paid.replay: .*in use by anoth"
    ):
        registry.make("paid", Context(options=options))
    (tmp_path / "notes").write_text("dear diary\n")
    with pytest.raises(UserError, match="notes: holds no scores: take another file"):
        replay(reward, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "dear diary\n"


def test_a_disk_that_is_full_is_one_line(reward, tmp_path, monkeypatch):
    """Oracle: the line, by hand; ENOSPC of the file system."""
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = replay(reward, "~/kept.jsonl")
    assert (tmp_path / "kept.jsonl").exists()
    kept._file = open("/dev/full", "ab")
    with pytest.raises(
        UserError, match="^reward_options.paid.replay: ~/kept.jsonl: no"
    ):
        kept(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "a", "scores": [1]}',
        '{"key": 1, "scores": {"paid": 1}}',
        '{"key": "a", "scores": {"paid": "1"}}',
        '{"key": "a", "scores": {"paid": NaN}}',
        '{"key": "a", "scores": {"paid": %s}}' % ("9" * 400),
        '{"key": "a", "scores": {"paid": %s}}' % ("9" * 5000),
        "[" * 100_000,
    ],
)
def test_files_of_something_else(reward, tmp_path, line):
    """Oracle: the line, by hand, and the file as it was."""
    path = tmp_path / "kept.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match="kept.jsonl: holds no scores: take another"):
        replay(reward, path)
    assert path.read_text() == f"{line}\n"


@pytest.mark.parametrize("path", ["a\0b", 5, ["a"]])
def test_paths_that_are_none(reward, path):
    with pytest.raises(UserError, match="^reward_options.paid.replay: "):
        replay(reward, path)


def test_a_disk_that_is_full_tears_no_line(reward, asked, tmp_path, monkeypatch):
    """Oracle: whole lines only, and what was written before is still known."""
    path = tmp_path / "kept"
    kept = replay(reward, path)
    kept(IMAGES[:2], PROMPTS[:2])
    before, write = path.read_bytes(), os.write

    def full(fd, data):
        write(fd, bytes(data[:9]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(UserError, match="^reward_options.paid.replay: .*no space"):
            kept(IMAGES, PROMPTS)
    assert path.read_bytes() == before
    kept(IMAGES, PROMPTS)
    assert asked == [2, 2, 2]
