"""Anyone's own reward: the example of the docs, calls, options, wrong returns."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import custom, registry
from flowgrpo_jax.rewards.registry import Context, combine

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 8, 4, 3), np.float32)
# Two images of each prompt, not side by side.
PROMPTS = [Prompt(text, {}, index) for index, text in enumerate("abc")] * 2


def write(folder, source, monkeypatch, name="my_rewards"):
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    """Oracle: both scores by hand; the example has at most 20 lines."""
    section = DOCS.read_text().partition("## Your own")[2]
    source, usage = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    assert source.startswith("# my_rewards.py") and source.count("\n") <= 20
    write(tmp_path, source, monkeypatch)
    settings: dict[str, dict] = {}
    exec(usage, settings)
    reward = combine(settings["reward"], Context(options=settings["reward_options"]))
    measured = reward(IMAGES, PROMPTS)

    red = IMAGES[..., 0] - np.maximum(IMAGES[..., 1], IMAGES[..., 2])
    redness = np.mean(red > 0.3, axis=(1, 2))
    half = np.abs(IMAGES[:3] - IMAGES[3:]).mean((1, 2, 3)) / 2
    np.testing.assert_allclose(measured["my_rewards.redness"], redness)
    variety = measured["my_rewards.variety"]
    np.testing.assert_allclose(variety, [*half, *half], rtol=1e-6)
    avg = redness + 0.2 * variety
    np.testing.assert_allclose(measured["avg"], avg, rtol=1e-6)


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "REWARDS", dict(registry.REWARDS))


def scores(function, **options):
    """What the reward "mine" measures of all images."""
    custom.reward("mine", **options)(function)
    return registry.make("mine")(IMAGES, PROMPTS)["mine"]


def test_each_call_gets_what_it_asked_for(names):
    """Oracle: the types and shapes by hand, and the mean of each image."""
    seen = []

    def mean(images, prompts):
        seen.append((images, prompts))
        return np.asarray(images).mean((-1, -2, -3))

    mine = IMAGES.mean((1, 2, 3))
    for options, count in [({}, 1), ({"by": "image"}, 6), ({"by": "group"}, 3)]:
        for kind in ("numpy", "jax"):
            seen.clear()
            measured = scores(mean, **options, images=kind)
            np.testing.assert_allclose(measured, mine, rtol=1e-6)
            assert len(seen) == count
            assert isinstance(seen[0][0], jax.Array if kind == "jax" else np.ndarray)
            assert registry.make("mine").on_device == (kind == "jax")
    # The last one was the groups: images 0 and 3 are those of the first prompt.
    np.testing.assert_array_equal(seen[0][0], IMAGES[[0, 3]])
    assert seen[0][1] == PROMPTS[0]


def test_pil_images(names):
    """Oracle: PIL's own size and pixels."""

    def first_red(image, prompt):
        assert isinstance(image, Image.Image) and image.size == (4, 8)
        return image.getpixel((0, 0))[0]

    measured = scores(first_red, by="image", images="pil")
    np.testing.assert_array_equal(measured, np.rint(255 * IMAGES[:, 0, 0, 0]))


def test_a_class_is_made_once_and_may_measure_more(tmp_path, monkeypatch):
    """Oracle: by hand: two calls, one object, both measurements."""
    source = (
        "made = []\n"
        "class Bright:\n"
        "    def __init__(self, scale):\n"
        "        made.append(scale); self.scale = scale\n"
        "    def __call__(self, images, prompts):\n"
        "        own = self.scale * images.mean((1, 2, 3))\n"
        "        return {'classy.Bright': own, 'height': [8] * len(images)}\n"
    )
    write(tmp_path, source, monkeypatch, "classy")
    reward = registry.make(
        "classy.Bright", Context(options={"classy.Bright": {"scale": 2.0}})
    )
    for _ in range(2):
        measured = reward(IMAGES, PROMPTS)
    bright = 2 * IMAGES.mean((1, 2, 3))
    np.testing.assert_allclose(measured["classy.Bright"], bright, rtol=1e-6)
    np.testing.assert_array_equal(measured["height"], 8)
    assert sys.modules["classy"].made == [2.0]


@pytest.mark.parametrize(
    "options, returns, line",
    [
        ({}, [1.0], r"returns \[1.0\], float64 of shape \(1,\): must be 6 numbers"),
        ({}, None, r"returns None, object of shape \(\): must be 6 numbers"),
        ({"by": "image"}, "good", r"returns good, <U4 of shape \(\): must be a number"),
        ({"by": "group"}, 1.0, r"returns 1.0, float64 of shape \(\): must be 2 numb"),
    ],
)
def test_a_wrong_return_is_one_line(names, options, returns, line):
    """Oracle: the line, by hand; it names the reward."""
    with pytest.raises(UserError, match=f"^reward: mine: {line}"):
        scores(lambda images, prompts: returns, **options)


def test_wrong_requests_are_one_line(names, tmp_path, monkeypatch):
    """Oracle: how the lines begin, by hand."""
    write(tmp_path, "number = 1\ndef fine(images, prompts): ...\n", monkeypatch)
    for name, options, line in [
        ("nosuch.module.f", {}, r"reward: nosuch.module.f: cannot be imported \(Mod"),
        ("my_rewards.f", {}, r"reward: my_rewards.f: cannot be imported \(Attrib"),
        ("my_rewards.number", {}, "reward: my_rewards.number: must be a function"),
        ("my_rewards.fine", {"x": 1}, "reward: my_rewards.fine: options {'x': 1}: "),
    ]:
        with pytest.raises(UserError, match=f"^{line}"):
            registry.make(name, Context(options={name: options}))
    with pytest.raises(UserError, match="^reward: by=pixel: must be one of"):
        custom.reward(by="pixel")
    with pytest.raises(UserError, match="^reward: ocr: is taken"):
        custom.reward("ocr")(lambda images, prompts: [])
