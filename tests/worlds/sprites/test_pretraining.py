"""Pretraining batches: stateless, clean at first, some without a caption."""

import functools

import numpy as np
import pytest

from flowgrpo_jax.worlds.sprites import pretraining, world

NOISE = dict.fromkeys(pretraining.TASK_SHARES, 0.5)
CLEAN, DROPOUT = 10, 0.1


@functools.cache
def stream(seed=0, noise=True, dropout=DROPOUT):
    return pretraining.SceneStream(seed, NOISE if noise else {}, CLEAN, dropout)


def same(one, other) -> bool:
    return one.captions == other.captions and all(
        np.array_equal(a, b) for a, b in zip(one.scenes, other.scenes, strict=True)
    )


def test_pure_function_of_seed_and_iteration():
    """Oracle: an invariance; another object and another order give the same batch."""
    first = [stream().batch(i, 32) for i in (3, 20)]
    fresh = pretraining.SceneStream(0, NOISE, CLEAN, DROPOUT)
    again = [fresh.batch(i, 32) for i in (20, 3)][::-1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], first[1])
    assert not same(first[0], stream(seed=1).batch(3, 32))


@pytest.mark.parametrize("iteration, clean", [(0, True), (9, True), (10, False)])
def test_clean_before_the_noise_begins(iteration, clean):
    """Oracle: the same stream without noise; equal until `clean` iterations."""
    noisy = stream().batch(iteration, 64)
    assert same(noisy, stream(noise=False).batch(iteration, 64)) == clean


def test_shapes():
    """Oracle: the contract; leaves of a Scene lead with the batch."""
    captions, scenes = stream().batch(0, 5)
    assert len(captions) == 5
    assert scenes.center.shape == (5, world.MAX_OBJECTS, 2)
    assert scenes.present.any(axis=1).all()


def test_dropout():
    """Closed form: Binomial(4000, .1) captions are empty, within 4 deviations."""
    captions, _ = stream().batch(0, 4000)
    share = np.mean([caption == "" for caption in captions])
    assert abs(share - DROPOUT) < 4 * np.sqrt(DROPOUT * (1 - DROPOUT) / 4000)
    assert "" not in stream(dropout=0.0).batch(0, 200).captions
    assert set(stream(dropout=1.0).batch(0, 200).captions) == {""}


def test_task_shares():
    """Closed form: TASK_SHARES sum to 1; 4000 captions follow them, 4 deviations."""
    assert sum(pretraining.TASK_SHARES.values()) == pytest.approx(1.0)
    captions, _ = stream(dropout=0.0).batch(0, 4000)
    counting = np.mean([c.split()[3] in ("two", "three", "four") for c in captions])
    position = np.mean(
        [
            any(f" {r} " in c for r in ("left", "right", "above", "below"))
            for c in captions
        ]
    )
    for share, expected in ((counting, "counting"), (position, "position")):
        p = pretraining.TASK_SHARES[expected]
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / 4000)
