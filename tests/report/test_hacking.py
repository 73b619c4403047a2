"""The rule of reward hacking on made series."""

import pytest

from flowgrpo_jax.report import hacking


def scores(reward, **values):
    return {"eval_reward_a": reward} | {f"eval_{k}": v for k, v in values.items()}


FIRST = scores(0.5, diversity=0.2, saturation=0.4, reward_b=3.0, reward_b_std=0.5)


@pytest.mark.parametrize(
    "now, expected",
    [
        # The reward rises and all is well, or better.
        (scores(0.9, diversity=0.19, saturation=0.3, reward_b=3.2), {}),
        # Diversity falls by half.
        (scores(0.9, diversity=0.1, saturation=0.4, reward_b=3.0), {"diversity": 0.5}),
        # Saturation is worse when it rises.
        (scores(0.9, diversity=0.2, saturation=0.6, reward_b=3), {"saturation": 0.5}),
        # A held-out reward falls by half its std, which is 8% of its value.
        (scores(0.9, diversity=0.2, reward_b=2.75), {"reward_b": 0.5}),
        # The reward fell too: bad, but no hacking.
        (scores(0.4, diversity=0.1, saturation=0.6, reward_b=2.0), {}),
        # Not measured.
        ({"eval_diversity": 0.1}, {}),
    ],
)
def test_the_rule(now, expected):
    """Oracle: by hand, for series that show one thing each."""
    found = hacking.fallen(FIRST, now, {"a": 1.0, "unused": 0.0}, 0.2)
    assert found == pytest.approx(expected)
    if expected:
        line = hacking.warning(found)
        assert line.startswith("warning: reward hacking?") and "\n" not in line
        assert f"{next(iter(expected))} by 0.50" in line


def test_a_slow_fall_is_found_once_it_is_deep():
    """Oracle: the first step at which a steady fall passes the threshold."""
    steps = [scores(0.5 + 0.01 * t, diversity=0.2 - 0.003 * t) for t in range(30)]
    found = [bool(hacking.fallen(steps[0], now, {"a": 1.0}, 0.2)) for now in steps]
    assert found.index(True) == 14 and all(found[14:])
