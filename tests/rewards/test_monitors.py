"""Monitors on made pictures."""

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import monitors, registry

RNG = np.random.default_rng(0)
OWNER = np.array([0, 0, 1, 1])
PROMPTS = [Prompt("a"), Prompt("a"), Prompt("b"), Prompt("b")]


def test_diversity_is_the_mean_distance_within_a_prompt():
    """Oracle: closed form; prompts differ by more than their own images do."""
    images = np.float32([0.5, 0.7, 0.1, 0.2])[:, None, None, None] * np.ones((8, 8, 3))
    found = monitors.diversity(images.astype(np.float32), OWNER)
    assert found == pytest.approx((0.2 + 0.1) / 2, abs=1e-6)
    assert np.isnan(monitors.diversity(images.astype(np.float32), np.arange(4)))


def test_saturation_is_that_of_hsv():
    """Oracle: PIL's conversion to HSV, which rounds to 1/255."""
    pixels = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    pixels[0, 0] = 0
    hsv = [np.asarray(Image.fromarray(p).convert("HSV"))[..., 1] for p in pixels]
    found = monitors.saturation(pixels.astype(np.float32) / 255, OWNER[:2])
    assert found == pytest.approx(np.mean(hsv) / 255, abs=1 / 255)


def test_a_grid_is_high_frequency():
    """Oracle: closed form for a chessboard of +-.1; none in a slope's interior."""
    rows, columns = np.indices((128, 128))
    board = 0.5 + 0.1 * (-1.0) ** (rows + columns)
    chess = np.tile(board[None, ..., None], (1, 1, 1, 3)).astype(np.float32)
    # Of nine pixels five have its own colour: the mean keeps a ninth.
    found = monitors.high_frequency(chess[:, :, :], OWNER[:1])
    assert found == pytest.approx(0.1 * 8 / 9, rel=0.02)
    slope = np.tile(columns[None, ..., None] / 128, (1, 1, 1, 3)).astype(np.float32)
    assert monitors.high_frequency(slope, OWNER[:1]) < 0.005


def test_held_out_rewards_and_objects():
    """Oracle: by hand: mean and std of the reward, and the detector's count."""
    context = registry.Context(lambda images: [[], [1], [1, 2], [3]])
    images = RNG.random((4, 8, 8, 3), np.float32)
    names = ("objects", "jpeg_incompressibility", "saturation")
    found = monitors.make(names, {"geneval": 1.0}, context)(images, PROMPTS, OWNER)
    size = registry.make("jpeg_incompressibility")(images, PROMPTS)
    values = size["jpeg_incompressibility"]
    assert found["objects"] == 1.0
    assert found["reward_jpeg_incompressibility"] == pytest.approx(values.mean())
    assert found["reward_jpeg_incompressibility_std"] == pytest.approx(values.std())
    assert set(found) == {
        "objects",
        "saturation",
        "reward_jpeg_incompressibility",
        "reward_jpeg_incompressibility_std",
    }


def test_wrong_names_are_one_line():
    """Oracle: how the lines begin, by hand."""
    context = registry.Context()
    for names, line in [
        (["nosuch"], "monitors: nosuch: must be one of diversity, sat"),
        (["geneval"], "monitors: geneval: is optimised"),
        (["objects"], "monitors: objects: needs a detector"),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            monitors.make(names, {"geneval": 1.0}, context)


def test_a_held_out_reward_that_fails_stops_nothing(monkeypatch, capfd):
    """Oracle: the line by hand; the other measurements are there."""
    calls = []

    def sometimes(images, prompts):
        calls.append(len(images))
        if len(calls) == 1:
            raise SystemExit(1)
        return {"sometimes": np.arange(4.0)}

    monkeypatch.setitem(registry.REWARDS, "sometimes", lambda context: sometimes)
    images = RNG.random((4, 8, 8, 3), np.float32)
    names = ("sometimes", "saturation")
    measure = monitors.make(names, {}, registry.Context(), deadline=60.0)
    found = measure(images, PROMPTS, OWNER)
    assert np.isnan(found["reward_sometimes"]) and found["saturation"] > 0
    assert "skipped: reward.sometimes: SystemExit: 1\n" in capfd.readouterr().err
    assert measure(images, PROMPTS, OWNER)["reward_sometimes"] == 1.5


def test_wrong_options_of_a_monitor_are_one_line():
    """Oracle: the line names the monitor and the option."""
    for name, line in [
        ("clip_diversity", "reward: clip_diversity: options .*nosuch"),
        ("saturation", "reward_options.saturation: this monitor has no options"),
    ]:
        context = registry.Context(options={name: {"nosuch": 1}})
        with pytest.raises(UserError, match=f"^{line}"):
            monitors.make([name], {}, context)
