"""Colours of objects against transformers' CLIP with PIL's crops."""

import numpy as np
import pytest

from flowgrpo_jax.data.geneval_grammar import COLORS10
from flowgrpo_jax.rewards.colors import ClipColors, crop
from flowgrpo_jax.rewards.detection import Detection

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from PIL import Image  # noqa: E402

from tests.parity import tiny_sd3  # noqa: E402

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIPModel with processor and tokenizer, as the hub has them."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_sd3.clip_tokenizer("<|endoftext|>")
    tower = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    text = dict(tower, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=dict(tower, image_size=SIDE, patch_size=16),
        projection_dim=12,
    )
    torch.manual_seed(0)
    tiny_sd3.randomize(transformers.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.save_pretrained(folder)
    return folder


def objects():
    """Random pictures with boxes and masks, upright and lying."""
    draw = np.random.default_rng(0)
    images = draw.uniform(size=(2, 60, 80, 3)).astype(np.float32)
    found = []
    for number in range(12):
        x, y = draw.integers(0, 30, 2)
        width, height = draw.integers(8, 30, 2)
        mask = np.zeros((60, 80), bool)
        mask[y : y + height, x : x + width] = draw.uniform(size=(height, width)) > 0.3
        box = tuple(map(float, (x, y, x + width, y + height)))
        name = ("cup", "traffic light")[number % 2]
        found.append((number % 2, Detection(name, 0.9, box, mask=mask)))
    return images, found


def picture(image, found):
    """As the benchmark: composite on #999, then the box."""
    whole = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    blank = Image.new("RGB", whole.size, "#999")
    return Image.composite(whole, blank, Image.fromarray(found.mask)).crop(found.box)


def test_colors(folder):
    images, found = objects()
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted, margins = [], []
    for image, one in found:
        texts = [
            wording.format(color)
            for color in COLORS10
            for wording in (
                f"a photo of a {{}} {one.class_name}",
                f"a photo of a {{}}-colored {one.class_name}",
                "a photo of a {} object",
            )
        ]
        inputs = tokenizer(
            texts, padding="max_length", max_length=77, return_tensors="pt"
        )
        pixels = processor(picture(images[image], one), return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, **pixels)
        classifier = output.text_embeds.reshape(10, 3, -1).mean(1)
        classifier = classifier / classifier.norm(dim=-1, keepdim=True)
        likeness = (classifier @ output.image_embeds[0]).numpy()
        wanted.append(COLORS10[likeness.argmax()])
        margins.append(np.diff(np.sort(likeness)[-2:])[0])
    names = ClipColors(str(folder), microbatch=5)(images, found)
    assert len(set(wanted)) > 1
    # Where two colours tie within the towers' tolerance, either may win.
    clear = np.array(margins) > 1e-4
    assert clear.sum() > 8
    assert [n for n, c in zip(names, clear, strict=True) if c] == [
        n for n, c in zip(wanted, clear, strict=True) if c
    ]


def test_crops_are_those_of_the_benchmark(folder):
    """Oracle: PIL's composite and crop, and transformers' resizing.

    Of an odd number of spare pixels transformers cuts the smaller half off first; the
    benchmark (torchvision) rounds to even, so only even numbers can be compared.
    """
    images, found = objects()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    steps = dict(do_rescale=False, do_normalize=False, return_tensors="np")
    compared = 0
    for image, one in found:
        wanted = picture(images[image], one)
        longer = int(SIDE * max(wanted.size) / min(wanted.size))
        if (longer - SIDE) % 2 == 0:
            pixels = processor(wanted, **steps)["pixel_values"][0]
            ours = crop(images[image], one, SIDE)
            assert np.array_equal(np.moveaxis(ours, -1, 0), pixels)
            compared += 1
    assert compared > 3
