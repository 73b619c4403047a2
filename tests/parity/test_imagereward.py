"""ImageReward on random weights, from images and texts, against torch.

The oracle is transformers' BlipVisionModel and BlipTextModel, and the package's head
and preprocessing (image-reward 1.5, ImageReward.py) written out here.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import blip
from flowgrpo_jax.models.encoders.blip import BlipConfig
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.rewards import imagereward, registry
from flowgrpo_jax.rewards.preprocess import MEAN, STD
from tests.parity.oracle import assert_close
from tests.parity.test_clip_scores import Head, as_pil
from tests.parity.tiny_sd3 import randomize

BAR = 1e-3
SIDE = 28
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red green circle on".split()]
TEXTS = ["a red circle", "green", "", "a circle on a circle " * 12]
CONFIG = BlipConfig(
    vocab_size=len(WORDS),
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=40,
    vision=dataclasses.replace(
        blip.VISION,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
    ),
)


@pytest.fixture(scope="module")
def theirs():
    """(vision, text, head)"""
    torch.manual_seed(0)
    vision = transformers.BlipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
        layer_norm_eps=1e-6,  # of timm's transformer, which the package uses
        initializer_range=0.1,
    )
    text = transformers.BlipTextConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        encoder_hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    return (
        randomize(transformers.BlipVisionModel(vision)),
        randomize(BlipTextModel(text, add_pooling_layer=False)),
        randomize(Head(24)),
    )


def timm_name(name):
    """A tensor of transformers' BlipVisionModel in the package's vision transformer."""
    for ours, other in {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "post_layernorm": "norm",
    }.items():
        name = name.replace(ours, other)
    return name


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """The weights under the names of ImageReward.pt."""
    vision, text, head = (part.state_dict() for part in theirs)
    state = {f"blip.visual_encoder.{timm_name(k)}": v for k, v in vision.items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.items()}
    state |= {f"mlp.{k}": v for k, v in head.items()}
    state |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(8, 32),
        "blip.text_proj.bias": torch.zeros(8),
    }
    path = tmp_path_factory.mktemp("imagereward") / "ImageReward.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def words():
    return transformers.BertTokenizer(vocab={w: n for n, w in enumerate(WORDS)})


@pytest.fixture(scope="module")
def images():
    """Four images of 8-bit values, higher than wide."""
    values = np.random.default_rng(0).integers(0, 256, (4, 56, 40, 3))
    return (values / 255).astype(np.float32)


def oracle(theirs, words, pictures):
    vision, text, head = theirs
    pixels = []
    for picture in pictures:
        width, height = picture.size
        height = int(SIDE * height / width)
        small = picture.resize((SIDE, height), Image.Resampling.BICUBIC)
        top = (height - SIDE) // 2
        small = np.asarray(small.crop((0, top, SIDE, top + SIDE)))
        pixels.append((small / 255.0 - np.array(MEAN)) / np.array(STD))
    pixels = torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2)
    tokens = words(
        TEXTS,
        padding="max_length",
        truncation=True,
        max_length=35,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=vision(pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return (head(states[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def test_score(theirs, file, words, images):
    """Prompts of one word, of none, and longer than the 35 tokens that are read."""
    scorer = imagereward.scorer(CONFIG, file, words, microbatch=3)
    prompts = [Prompt(text) for text in TEXTS]
    scores = scorer(images, prompts)["imagereward"]
    expected = oracle(theirs, words, as_pil(images))
    assert expected.std() > 0.01 * expected.abs().max()
    assert_close(scores, expected, BAR)
    uphill = jax.grad(lambda x: scorer.differentiable(prompts)(x).sum())(images)
    assert np.isfinite(uphill).all() and np.abs(uphill).max() > 0


def test_real_size():
    """Names and shapes of the released size against the same classes of transformers."""
    vision = transformers.BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
    )
    text = transformers.BlipTextConfig(encoder_hidden_size=1024)
    with torch.device("meta"):
        vision = transformers.BlipVisionModel(vision)
        text = BlipTextModel(text, add_pooling_layer=False)
    state = {f"visual_encoder.{timm_name(k)}": v for k, v in vision.named_parameters()}
    state |= {f"text_encoder.{k}": v for k, v in text.named_parameters()}
    named = tensors.names(blip.table(), blip.shapes(BlipConfig()))
    assert named == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_tokenizer_comes_from_a_folder(file, words, tmp_path):
    """The real size with weights of another: the line names the tensor."""
    words.save_pretrained(tmp_path)
    options = {"weights": str(file), "tokenizer": str(tmp_path)}
    context = registry.Context(options={"imagereward": options})
    with pytest.raises(UserError, match=r"shape \[.*the configuration asks for"):
        registry.make("imagereward", context)


def test_without_weights():
    with pytest.raises(UserError, match=r"ImageReward.pt"):
        registry.make("imagereward")
