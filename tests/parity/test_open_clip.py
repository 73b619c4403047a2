"""CLIPs in open_clip's layout against open_clip itself, random weights, from a folder.

The oracle loads the folder as the authors of G2RPO load DFN's ViT-H/14: network,
activation and preprocessing are all told by its open_clip_config.json. It is the extra
`openclip`, which CI installs for this file after the other tests.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import clip_weights
from flowgrpo_jax.models.encoders.clip import CLIP
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.preprocess import Preprocess
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import clip_tokenizer, randomize

open_clip = pytest.importorskip("open_clip")

BAR = 1e-3
SIDE = 28
TEXTS = ["a photo of the red circle", "green square", "", "red " * 90]
PROMPTS = [Prompt(text) for text in TEXTS]
# As apple/DFN5B-CLIP-ViT-H-14 tells its own, and as laion's ViT-H/14.
DFN = {"interpolation": "bicubic", "resize_mode": "squash"}
PREPROCESS = {
    "dfn": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], **DFN},
    "laion": {},
    "longest": {"resize_mode": "longest", "interpolation": None},
}


def model_config(quick_gelu=True):
    return {
        "embed_dim": 20,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 7,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": len(clip_tokenizer("!")),
            "width": 24,
            "heads": 2,
            "layers": 2,
        },
    }


def write(folder, quick_gelu=True, preprocess="dfn"):
    """A folder as open_clip saves a model for the hub; returns it."""
    torch.manual_seed(0)
    config = model_config(quick_gelu)
    weights = randomize(open_clip.CLIP(**config)).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    clip_tokenizer("!").save_pretrained(folder)
    told = {"model_cfg": config, "preprocess_cfg": PREPROCESS[preprocess]}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def images():
    """Four images of 8-bit values, wider than high, with an odd pixel to cut."""
    values = np.random.default_rng(0).integers(0, 256, (4, 40, 57, 3))
    return (values / 255).astype(np.float32)


def cosines(folder, images):
    """Of each image with its text, by open_clip."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pictures = [Image.fromarray(np.uint8(np.round(image * 255))) for image in images]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        vectors = model.eval().encode_image(pixels, normalize=True)
        texts = model.encode_text(ids, normalize=True)
    return (vectors * texts).sum(-1), model.logit_scale.exp().item()


@pytest.mark.parametrize(
    "quick_gelu, preprocess, alone",
    [(True, "dfn", True), (False, "laion", False), (True, "longest", False)],
)
def test_the_score_of_dfn(quick_gelu, preprocess, alone, images, tmp_path):
    """Oracle: open_clip; from the folder, and from a file beside its configuration."""
    folder = write(tmp_path, quick_gelu, preprocess)
    expected, scale = cosines(folder, images)
    options = {"weights": str(folder)}
    if alone:
        file = str(folder / "open_clip_model.safetensors")
        options = {"weights": file, "processor": str(folder), "cosine": True}
    context = registry.Context(options={"clipscore": options})
    scores = registry.make("clipscore", context)(images, PROMPTS)["clipscore"]
    assert_close(scores, expected if alone else expected * scale / 30, BAR)


# What open_clip's own package says of the two of DFN-5B, and of what HPS v2 is made of.
@pytest.mark.parametrize(
    "name, quick_gelu, side, count",
    [
        ("ViT-H-14-quickgelu", True, 224, 986_109_441),
        ("ViT-H-14-378-quickgelu", True, 378, 986_714_881),
        ("ViT-H-14", False, 224, 986_109_441),
    ],
)
def test_sizes_of_the_released_ones(name, quick_gelu, side, count):
    """Names, shapes and count of open_clip's model on the meta device."""
    values = open_clip.get_model_config(name)
    config = clip_weights.open_clip_config(values)
    assert config.vision.image_size == side
    act = "quick_gelu" if quick_gelu else "gelu"
    assert config.text.hidden_act == config.vision.hidden_act == act
    with torch.device("meta"):
        theirs = open_clip.CLIP(**values)
    like = clip_weights.shapes(CLIP(config))
    named = tensors.names(clip_weights.OPEN_CLIP_TABLE, like)
    assert named == {k: tuple(v.shape) for k, v in theirs.named_parameters()}
    assert sum(v.numel() for v in theirs.parameters()) == count
    if quick_gelu:
        released = open_clip.get_pretrained_cfg(name, "dfn5b")
        assert released["quick_gelu"] and released["resize_mode"] == "squash"


def test_tokens_are_those_of_open_clip(tmp_path):
    """Oracle: open_clip's tokenizer, whose vocabulary comes in its package.

    Up to the end token, which both keep where they cut; padding is never read.
    """
    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    theirs = open_clip.get_tokenizer("ViT-H-14")
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {ends.get(token, token): n for token, n in theirs.encoder.items()}
    ours = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    ours.save_pretrained(tmp_path)
    texts = [
        "A cat's whiskers, 8k, ArtStation;  (trending:1.2)",
        "naïve café — 東京 at night 🌃",
        "masterpiece, " * 60,
        "",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = tokenizer(
        texts, padding="max_length", max_length=77, truncation=True
    ).input_ids
    for mine, wanted in zip(found, theirs(texts).tolist(), strict=True):
        end = wanted.index(49407) + 1
        assert mine[:end] == wanted[:end]


@pytest.mark.parametrize(
    "told, line",
    [
        ({"resize_mode": "fit"}, 'preprocess_cfg: resize_mode: "fit": only "shortest"'),
        ({"size": 224}, "preprocess_cfg: size: 224: only 28"),
        ({"mean": 0.5}, "preprocess_cfg: mean: 0.5: must be 3 numbers"),
        ({"sharpen": 2}, "preprocess_cfg: sharpen: 2: not followed"),
        ([1], "preprocess_cfg: must be an object"),
    ],
)
def test_steps_that_are_not_implemented(told, line, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": told})
    )
    with pytest.raises(UserError, match=line):
        Preprocess.from_open_clip(tmp_path, SIDE)
