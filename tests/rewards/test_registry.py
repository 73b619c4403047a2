"""Rewards by name and their weighted sum."""

import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.detection import Detection
from flowgrpo_jax.rewards.registry import Context, combine, make

CAT = Detection("cat", 0.9, (0.0, 0.0, 4.0, 4.0))
PROMPT = Prompt(
    "a photo of a cat",
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}]},
)


def _detector(images):
    return [[CAT] if image.mean() > 0.5 else [] for image in np.asarray(images)]


def _brightness(context, scale=1.0):
    def reward(images, prompts):
        values = scale * np.asarray(images).mean((1, 2, 3))
        return {"brightness": values, "size": np.full(len(images), 8.0)}

    return reward


@pytest.fixture
def brightness(monkeypatch):
    monkeypatch.setitem(registry.REWARDS, "brightness", _brightness)


@pytest.mark.parametrize("numpy", [np, jnp])
def test_avg_is_the_weighted_sum(brightness, numpy):
    """Oracle: .5 * geneval + 2 * brightness, for numpy and for JAX images."""
    images = numpy.stack([numpy.zeros((8, 8, 3)), numpy.ones((8, 8, 3))])
    context = Context(_detector, {"brightness": {"scale": 3.0}})
    reward = combine({"geneval": 0.5, "brightness": 2}, context)
    result = reward(images.astype("float32"), [PROMPT, PROMPT])
    np.testing.assert_allclose(result["geneval"], [0, 1])
    np.testing.assert_allclose(result["brightness"], [0, 3])
    np.testing.assert_allclose(result["avg"], [0, 6.5])
    assert result["avg"].dtype == np.float32
    assert {"accuracy", "strict_accuracy", "objects", "exact_count", "size"} < set(
        result
    )


def test_wrong_requests():
    """Oracle: the message names the key `reward`, the value and what is allowed."""
    with pytest.raises(UserError, match="^reward: pixscore: must be one of geneval, "):
        combine({"pixscore": 1.0})
    with pytest.raises(UserError, match="^reward: {}: .*geneval"):
        combine({})
    with pytest.raises(UserError, match=r"^reward_options.geneval.detector: none: no "):
        make("geneval", Context(options={"geneval": {"detector": "none"}}))
    with pytest.raises(UserError, match="^reward: geneval: weight nan: "):
        combine({"geneval": float("nan")}, Context(_detector))
    with pytest.raises(UserError, match="^reward: geneval: options .*penalty"):
        make("geneval", Context(_detector, {"geneval": {"penalty": 1.0}}))


def test_two_rewards_may_not_write_one_measurement(monkeypatch):
    """Oracle: an error instead of a silent overwrite."""
    monkeypatch.setitem(
        registry.REWARDS,
        "other",
        lambda context: (
            lambda images, prompts: {
                "other": np.zeros(1),
                "accuracy": np.zeros(1),
            }
        ),
    )
    reward = combine({"geneval": 1, "other": 1}, Context(_detector))
    with pytest.raises(ValueError, match="other measures {'accuracy'} a second time"):
        reward(np.zeros((1, 8, 8, 3), np.float32), [PROMPT])


def test_a_reward_of_weight_0_is_measured_only(brightness):
    """Oracle: avg is that of the others, even where the measurement is NaN."""
    images = np.stack([np.zeros((8, 8, 3)), np.ones((8, 8, 3))]).astype("float32")
    context = Context(_detector, {"brightness": {"scale": np.nan}})
    result = combine({"geneval": 0.5, "brightness": 0}, context)(images, [PROMPT] * 2)
    np.testing.assert_array_equal(result["avg"], [0, 0.5])
    assert np.isnan(result["brightness"]).all()


def test_a_context_makes_each_reward_once(monkeypatch):
    """Oracle: the calls of the factory; another context makes its own."""
    made = []

    def factory(context):
        made.append(context)
        return lambda images, prompts: {"counted": np.zeros(len(images))}

    monkeypatch.setitem(registry.REWARDS, "counted", factory)
    context = Context()
    first = combine({"counted": 1.0}, context).rewards["counted"]
    assert combine({"counted": 2.0}, context).rewards["counted"] is first
    assert make("counted", Context()) is not first
    assert len(made) == 2


@pytest.mark.parametrize(
    "weight", ["1", None, [1.0], {}, True, np.nan, np.inf, 10**400, 1e300, 1j]
)
def test_a_weight_that_is_no_number(weight):
    """Oracle: the line names the reward; nothing is loaded before it."""
    with pytest.raises(UserError, match="^reward: nosuch: weight .*: must be finite"):
        registry.check_weights("reward", {"nosuch": weight})


@pytest.mark.parametrize("error", [OSError("no weights"), KeyError("x"), ImportError()])
def test_a_reward_that_cannot_be_loaded_is_one_line(monkeypatch, error):
    """Oracle: the line by hand; no traceback is of the user's own code."""

    def fails(context):
        raise error

    monkeypatch.setitem(registry.REWARDS, "loads", fails)
    line = f"reward: loads: cannot be loaded: {type(error).__name__}"
    with pytest.raises(UserError, match=f"^{line}") as caught:
        make("loads")
    assert caught.value.shown == ""


@pytest.mark.parametrize("option", ["name", "factory", "context", "self"])
def test_options_of_any_name_are_one_line(option):
    """Oracle: the line names the reward and the option, also where we use its name."""
    for name in ("geneval", "jpeg_compressibility", "judge"):
        with pytest.raises(UserError, match=f"^reward: {name}: options .*{option}"):
            make(name, Context(_detector, {name: {option: 1}}))
