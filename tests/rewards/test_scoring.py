"""Rewards on threads: order, deadlines, and one line for whatever goes wrong."""

import os
import threading
import time

import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import custom
from flowgrpo_jax.rewards.registry import Combined
from flowgrpo_jax.rewards.scoring import RewardFailure, Scorer, try_out

PROMPTS = [Prompt(str(number), {}, number) for number in range(6)]
IMAGES = np.linspace(0, 1, 6 * 4 * 4 * 3, dtype=np.float32).reshape(6, 4, 4, 3)


def brightness(images, prompts):
    return {"bright": images.mean(axis=(1, 2, 3)), "number": _numbers(prompts)}


def _numbers(prompts):
    return np.array([prompt.index for prompt in prompts])


def scorer_of(deadline=5.0, **rewards):
    return Scorer(Combined(rewards, dict.fromkeys(rewards, 1.0)), deadline)


def halves(scorer):
    return [
        scorer.start(IMAGES[part], PROMPTS[part]) for part in (slice(2), slice(2, 6))
    ]


def test_batches_come_together_in_their_order():
    """Oracle: the call of all images at once, whichever reward is the slower one."""

    def late_first(images, prompts):
        time.sleep(0.2 / len(images))
        return {"late": -_numbers(prompts)}

    together = Combined(
        {"bright": brightness, "late": late_first}, {"bright": 2.0, "late": 0.5}
    )
    scorer = Scorer(together)
    in_parts = scorer.finish(halves(scorer))
    at_once = together(IMAGES, PROMPTS)
    assert list(in_parts) == list(at_once)
    for name, values in at_once.items():
        np.testing.assert_array_equal(in_parts[name], values)
        assert in_parts[name].dtype == values.dtype


def test_a_reward_has_one_thread_and_rewards_run_side_by_side():
    """Oracle: thread identities; two rewards that wait for each other both end."""
    meeting = threading.Barrier(2)
    threads = {"a": set(), "b": set()}

    def meet(name):
        def reward(images, prompts):
            threads[name].add(threading.get_ident())
            meeting.wait(5)
            return {name: np.zeros(len(images))}

        return reward

    scorer = scorer_of(a=meet("a"), b=meet("b"))
    scorer.finish(halves(scorer))
    assert len(threads["a"]) == len(threads["b"]) == 1
    assert len(threads["a"] | threads["b"] | {threading.get_ident()}) == 3


def test_a_device_reward_runs_on_the_thread_of_the_loop():
    """Oracle: thread identities."""

    def reward(images, prompts):
        assert threading.get_ident() == caller
        return {"device": np.zeros(len(images))}

    caller, reward.on_device = threading.get_ident(), True
    scorer_of(device=reward)(IMAGES, PROMPTS)


def raises(images, prompts):
    raise KeyError("no such word")


def refuses(images, prompts):
    raise UserError("reward.odd: word: must be known")


def names_nobody(images, prompts):
    raise UserError("word: must be known")


@pytest.mark.parametrize(
    "reward, line",
    [
        (raises, "reward.odd: KeyError: 'no such word'"),
        (refuses, "reward.odd: word: must be known"),
        (names_nobody, "reward.odd: word: must be known"),
        (lambda i, p: None, "reward.odd: returns None: must return a dict with odd"),
        (lambda i, p: {"even": 1}, r"reward.odd: returns \['even'\]: must return"),
        (lambda i, p: {"odd": i[:1, 0, 0, 0]}, r"reward.odd: odd of 6 .*\(1,\): must"),
        (lambda i, p: {"odd": ["x"] * 6}, "reward.odd: odd of 6 images is <U1"),
        (lambda i, p: {"odd": _numbers(p) / 0}, "reward.odd: nan of sample 0: must be"),
        (
            lambda i, p: {"odd": [1e300] * 6},
            r"reward.odd: 1e\+300 of sample 0: must be",
        ),
        (
            lambda i, p: {"odd": np.full(6, 3e38, np.float32)},
            r"reward.odd: 3e\+38 of sam",
        ),
        (
            lambda i, p: {"odd": [10**400] * 6},
            "reward.odd: inf of sample 0: must be fi",
        ),
        (lambda i, p: {"odd": [1j] * 6}, "reward.odd: odd of 6 images is complex128"),
        (lambda i, p: exec("raise SystemExit(2)"), "reward.odd: SystemExit: 2"),
        (lambda i, p: exec("raise GeneratorExit"), "reward.odd: GeneratorExit"),
        (lambda i, p: exec("raise KeyboardInterrupt"), "reward.odd: KeyboardInterrupt"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_whatever_goes_wrong_is_one_line(reward, line):
    """Oracle: the line, by hand."""
    with pytest.raises(RewardFailure, match=f"^{line}") as caught:
        scorer_of(odd=reward)(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", [False, True])
def test_waiting_can_be_given_up(skip):
    """Oracle: what the check raises, long before the deadline."""
    looked = []

    def stop():
        looked.append(0)
        if len(looked) == 3:
            raise KeyError("stop")

    scorer = scorer_of(deadline=600.0, slow=lambda images, prompts: time.sleep(60))
    scorer.check = stop
    with pytest.raises(KeyError, match="stop"):
        scorer.finish(halves(scorer), skip)


def test_a_reward_that_hangs_stops_at_the_deadline():
    """Oracle: the clock; and the thread that hangs keeps nothing from ending."""
    forever = threading.Event()

    def hangs(images, prompts):
        forever.wait(30)
        return {"slow": np.zeros(len(images))}

    scorer = scorer_of(deadline=0.2, bright=brightness, slow=hangs)
    begin = time.monotonic()
    with pytest.raises(RewardFailure, match="^reward.slow: no scores within 0.2 s"):
        scorer.finish(halves(scorer))
    assert time.monotonic() - begin < 2.0
    forever.set()


def test_skipping_leaves_out_what_failed(capfd):
    """Oracle: by hand; the second batch of one reward fails, the rest is there."""

    def fails_on_four(images, prompts):
        if len(images) == 4:
            raise OSError("gone")
        return {"some": _numbers(prompts) / 2}

    scorer = scorer_of(bright=brightness, some=fails_on_four)
    scores = scorer.finish(halves(scorer), skip=True)
    np.testing.assert_array_equal(scores["some"], [0, 0.5, *[np.nan] * 4])
    np.testing.assert_array_equal(scores["number"], range(6))
    np.testing.assert_array_equal(np.isnan(scores["avg"]), [0, 0, 1, 1, 1, 1])
    assert capfd.readouterr().err == "skipped: reward.some: OSError: gone\n"
    with pytest.raises(RewardFailure, match="^reward.some: OSError: gone$"):
        scorer.finish(halves(scorer))


def test_a_failure_is_told_while_others_still_work():
    """Oracle: the order of things; the slow one is let go only after the line."""
    go = threading.Event()

    def slow(images, prompts):
        assert go.wait(60)
        return {"slow": np.zeros(len(images))}

    scorer = scorer_of(deadline=600.0, slow=slow, odd=raises)
    try:
        with pytest.raises(RewardFailure, match="^reward.odd: KeyError"):
            scorer.finish(halves(scorer))
    finally:
        go.set()


@pytest.mark.parametrize(
    "scores, weights, line",
    [
        ({"a": [1.0, 2.0]}, {"a": 1e18}, r"2e\+18, the weighted sum: must be at most"),
        ({"a": [-9e17] * 2, "b": [-9e17] * 2}, {"a": 1, "b": 1.0}, r"-1.8e\+18, the w"),
    ],
)
def test_a_sum_that_is_too_large(scores, weights, line):
    """Oracle: the line by hand; each reward by itself is a number like others."""
    rewards = {
        name: lambda images, prompts, name=name: {name: scores[name]} for name in scores
    }
    with pytest.raises(RewardFailure, match=f"^reward: avg: {line}"):
        Scorer(Combined(rewards, weights))(IMAGES[:2], PROMPTS[:2])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.bool_, np.float16])
def test_the_sum_does_not_wrap_around(dtype):
    """Oracle: the sum in Python's own numbers."""
    values = np.array([1, 200], dtype)
    scorer = Scorer(Combined({"a": lambda images, prompts: {"a": values}}, {"a": 1000}))
    measured = scorer(IMAGES[:2], PROMPTS[:2])
    assert measured["avg"].tolist() == [1000 * float(value) for value in values]


def test_what_is_no_number_is_skipped_of_any_type():
    """Oracle: by hand; a whole number that is too large becomes NaN too."""
    scorer = scorer_of(a=lambda images, prompts: {"a": [2**62, 5]})
    scores = scorer.finish([scorer.start(IMAGES[:2], PROMPTS[:2])], skip=True)
    np.testing.assert_array_equal(scores["a"], [np.nan, 5])


def test_scores_are_those_of_the_call():
    """Oracle: by hand; the reward writes all its scores on one array."""
    buffer = np.zeros(2)

    def counts(images, prompts):
        buffer[:] = _numbers(prompts)
        return {"a": buffer}

    scorer = scorer_of(a=counts)
    parts = [scorer.start(IMAGES[i : i + 2], PROMPTS[i : i + 2]) for i in (0, 2, 4)]
    assert scorer.finish(parts)["a"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_folder_is_that_of_the_run_while_a_reward_hangs(tmp_path):
    """Oracle: the folder before; what is saved next goes where it belongs."""
    before, forever = os.getcwd(), threading.Event()

    def leaves(images, prompts):
        os.chdir(tmp_path)
        forever.wait(30)

    scorer = scorer_of(deadline=0.2, away=custom.make("away", leaves, {}))
    with pytest.raises(RewardFailure, match="^reward.away: no scores within 0.2 s"):
        scorer(IMAGES, PROMPTS)
    assert os.getcwd() == before
    [hanging] = [one for one in threading.enumerate() if one.name == "away"]
    forever.set()
    del scorer
    hanging.join(60)


def test_a_traceback_is_shown_once_where_failures_are_skipped(capfd):
    """Oracle: how often the user's line stands there; it is told each time."""

    def bug(images, prompts):
        raise KeyError("such a bug")

    scorer = scorer_of(mine=custom.make("mine", bug, {}))
    scores = scorer.finish(halves(scorer), skip=True)
    assert np.isnan(scores["avg"]).all()
    told = capfd.readouterr().err
    assert told.count("in bug") == 1
    assert told.count("skipped: reward.mine: KeyError: 'such a bug'\n") == 2


def test_rewards_are_tried_on_two_images_and_their_prompts():
    """Oracle: what the calls got; those on the device have a deadline too."""
    seen = {}

    def watch(name, **options):
        def reward(images, prompts):
            seen[name] = images.shape, prompts, threading.get_ident()
            return {name: images.mean((1, 2, 3))}

        for key, value in options.items():
            setattr(reward, key, value)
        return reward

    rewards = {"a": watch("a"), "b": watch("b", by_group=True)}
    rewards["c"] = watch("c", on_device=True)
    asked = dict.fromkeys(rewards, PROMPTS)
    measured = try_out(rewards, asked, (8, 4), 60.0)
    assert list(measured) == ["a", "b", "c"] and measured["c"]["c"].shape == (2,)
    ends = [PROMPTS[0], PROMPTS[-1]]
    for name, prompts in [("a", ends), ("b", [PROMPTS[0]] * 2), ("c", ends)]:
        assert seen[name][0] == (2, 8, 4, 3) and seen[name][1] == prompts
        assert seen[name][2] != threading.get_ident()
    again = try_out(rewards, asked, (8, 4), 60.0)
    np.testing.assert_array_equal(again["a"]["a"], measured["a"]["a"])
    for bad, line in [
        (raises, "KeyError"),
        (lambda i, p: {"odd": [0.0, np.nan]}, "nan"),
    ]:
        with pytest.raises(RewardFailure, match=f"^reward.odd: {line}"):
            try_out({"odd": bad}, {"odd": PROMPTS}, (8, 4), 60.0)
