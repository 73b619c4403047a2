"""Anyone's own reward: the example of the docs, calls, options, wrong returns."""

import copy
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("kind", ["numpy", "jax", "pil"])
@pytest.mark.parametrize("by", ["batch", "image", "group"])
def test_what_a_call_gets_is_its_own(names, by, kind):
    """Oracle: images and prompts of the run, before; a second reward sees them."""
    images = IMAGES.copy()
    prompts = [
        Prompt(text, {"include": [{"count": 1}]}, i) for i, text in enumerate("aab")
    ] * 2
    before = copy.deepcopy(prompts)

    def rude(images, prompts):
        if kind == "numpy":
            torch.from_numpy(images).sub_(0.5).div_(0.1)
            images *= 0
        elif kind == "pil":
            for image in images if by != "image" else [images]:
                image.paste((0, 0, 0), (0, 0, *image.size))
        else:
            erase = jax.jit(lambda x: x * 0, donate_argnums=0)
            erase(images)
        some = prompts if by == "batch" else [prompts]
        for prompt in some:
            prompt.metadata["include"][0]["count"] = 7
            prompt.metadata.clear()
        if by == "batch":
            prompts.clear()
            return [0.0] * 6
        return 0.0 if by == "image" else [0.0] * 2

    custom.reward("rude", by=by, images=kind)(rude)
    for given in (images, jnp.asarray(images)):
        measured = registry.make("rude")(given, prompts)
        assert measured["rude"].tolist() == [0.0] * 6
        np.testing.assert_array_equal(given, IMAGES)
    assert prompts == before


@pytest.mark.parametrize(
    "options, returns, wanted",
    [
        ({}, (np.arange(6.0), {"more": 1}), np.arange(6)),
        ({}, ({"mine": torch.arange(6.0)}, {}), np.arange(6)),
        ({}, {"mine": np.arange(6.0)[:, None]}, np.arange(6)),
        ({"by": "image"}, (2.0, {"more": 1}), [2] * 6),
        ({"by": "image"}, torch.ones(1, requires_grad=True), [1] * 6),
        ({"by": "group"}, ([1.0, 2.0], None), [1, 1, 1, 2, 2, 2]),
    ],
)
def test_scores_come_with_more(names, options, returns, wanted):
    """Oracle: by hand."""
    np.testing.assert_array_equal(
        scores(lambda images, prompts: returns, **options), wanted
    )


def test_an_error_names_the_reward_and_the_prompt(names):
    """Oracle: the line, by hand; a call of one prompt can tell which."""

    def fails(images, prompt):
        return {"a": [1.0, 1.0]}[prompt.text][: images.ndim - 2]

    for by in ("image", "group"):
        with pytest.raises(UserError) as caught:
            scores(fails, by=by)
        assert str(caught.value) == "reward.mine: prompt 1 'b': KeyError: 'b'"
        assert "in fails" in caught.value.shown


LOADING = """
import sys
def fine(images, prompts): return [0.0] * len(images)
class NoWeights:
    def __init__(self): raise FileNotFoundError("weights.pt")
    def __call__(self, images, prompts): ...
class Exits:
    def __init__(self): sys.exit("no CUDA")
    def __call__(self, images, prompts): ...
class Bug:
    def __init__(self): None + 1
    def __call__(self, images, prompts): ...
class NoCall: ...
class Options:
    def __init__(self, scale): ...
    def __call__(self, images, prompts): ...
"""


@pytest.mark.parametrize(
    "name, line, shows",
    [
        ("NoWeights", "reward.load.NoWeights: cannot be made: FileNotFoundError: w", 1),
        ("Exits", "reward.load.Exits: cannot be made: SystemExit: no CUDA", 1),
        ("Bug", "reward.load.Bug: cannot be made: TypeError: unsupported", 1),
        ("NoCall", "reward: load.NoCall: must have a __call__", 0),
        ("Options", "reward: load.Options: options {}: missing a required", 0),
    ],
)
def test_a_class_that_cannot_be_made(tmp_path, monkeypatch, name, line, shows):
    """Oracle: the line by hand; the traceback is of the user's file alone."""
    write(tmp_path, LOADING, monkeypatch, "load")
    with pytest.raises(UserError) as caught:
        registry.make(f"load.{name}")
    assert str(caught.value).startswith(line)
    frames = [x for x in caught.value.shown.splitlines() if '  File "' in x]
    assert len(frames) == shows and all("load.py" in frame for frame in frames)


@pytest.mark.parametrize(
    "source, told, shows",
    [
        (
            "import nosuchpackage",
            "ModuleNotFoundError: No module named",
            "import nosuch",
        ),
        ("def f(:", "SyntaxError: invalid syntax", "def f(:"),
        ("raise SystemExit(2)", "SystemExit: 2", "raise SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", "raise KeyboardInterrupt"),
        ("1 / 0", "ZeroDivisionError: division by zero", "1 / 0"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, source, told, shows):
    """Oracle: the line by hand; the user's line of code stands above it."""
    write(tmp_path, source, monkeypatch, "broken")
    with pytest.raises(UserError) as caught:
        registry.make("broken.f")
    line = f"reward: broken.f: cannot be imported ({told}"
    assert str(caught.value).startswith(line)
    assert shows in caught.value.shown and "importlib" not in caught.value.shown


def test_a_decorator_without_brackets(names):
    """Oracle: the same scores as with them."""

    @custom.reward
    def plain(images, prompts):
        return images.mean((1, 2, 3))

    measured = custom.make("plain", plain, {})(IMAGES, PROMPTS)
    np.testing.assert_allclose(measured["plain"], IMAGES.mean((1, 2, 3)), rtol=1e-6)


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
