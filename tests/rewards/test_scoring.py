"""Rewards on threads: order, deadlines, and one line for whatever goes wrong."""

import threading
import time

import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.registry import Combined
from flowgrpo_jax.rewards.scoring import RewardFailure, Scorer

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


@pytest.mark.parametrize(
    "reward, line",
    [
        (raises, "reward.odd: KeyError: 'no such word'"),
        (refuses, "reward.odd: word: must be known"),
        (lambda i, p: None, "reward.odd: returns None: must return a dict with odd"),
        (lambda i, p: {"even": 1}, r"reward.odd: returns \['even'\]: must return"),
        (lambda i, p: {"odd": i[:1, 0, 0, 0]}, r"reward.odd: odd of 6 .*\(1,\): must"),
        (lambda i, p: {"odd": ["x"] * 6}, "reward.odd: odd of 6 images is <U1"),
        (lambda i, p: {"odd": _numbers(p) / 0}, "reward.odd: nan of sample 0: must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_whatever_goes_wrong_is_one_line(reward, line):
    """Oracle: the line, by hand."""
    with pytest.raises(RewardFailure, match=f"^{line}") as caught:
        scorer_of(odd=reward)(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)


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
