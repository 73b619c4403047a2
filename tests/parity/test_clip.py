"""CLIP's towers against transformers (torch, fp32), random weights, from its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import clip_weights
from flowgrpo_jax.models.encoders.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig
from flowgrpo_jax.models.files import tensors
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import randomize

WORDS, EOS = 50, 49
TEXT = dict(
    vocab_size=WORDS,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=48,
    eos_token_id=EOS,
    projection_dim=20,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=12,
    patch_size=4,
    projection_dim=20,
)
CLIP_L, CLIP_G = "quick_gelu", "gelu"
IDS = np.array(
    [
        [48, 7, 3, EOS, EOS, EOS, EOS, EOS],
        [48, 1, 2, 3, 4, 5, 6, EOS],
        [48, EOS, 0, 0, 0, 0, 0, 0],
    ]
)


def text_model(kind, **changes):
    torch.manual_seed(0)
    return randomize(kind(transformers.CLIPTextConfig(**{**TEXT, **changes})))


def clip_model(**changes):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, **changes},
        vision_config={**VISION, **changes},
        projection_dim=20,
    )
    return randomize(transformers.CLIPModel(config))


@pytest.mark.parametrize("act", [CLIP_L, CLIP_G])
def test_text_with_projection(tmp_path, act):
    """SD3's text encoders: every state that its pipeline takes."""
    theirs = text_model(transformers.CLIPTextModelWithProjection, hidden_act=act)
    theirs.save_pretrained(tmp_path)
    network, params = clip_weights.read_text(tmp_path)
    ours = jax.jit(network.apply)({"params": params}, IDS)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    assert_close(ours.last, expected.last_hidden_state)
    assert_close(ours.penultimate, expected.hidden_states[-2])
    assert_close(ours.pooled, expected.text_embeds)


@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_without_projection(tmp_path, prefix, eos):
    """Files of transformers 5 and of earlier ones; end token of old configs."""
    theirs = text_model(transformers.CLIPTextModel, eos_token_id=eos)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({prefix + k: v for k, v in load_file(file).items()}, file)
    network, params = clip_weights.read_text(tmp_path)
    ours = jax.jit(network.apply)({"params": params}, IDS)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS))
    assert network.config.projection_dim is None
    assert_close(ours.last, expected.last_hidden_state)
    assert_close(ours.pooled, expected.pooler_output)


@pytest.fixture(scope="module", params=[CLIP_L, CLIP_G])
def both(request, tmp_path_factory):
    """(CLIPModel, its folder)"""
    theirs, folder = clip_model(hidden_act=request.param), tmp_path_factory.mktemp("c")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)


def test_vision(both, pixels):
    theirs, folder = both
    network, params = clip_weights.read(folder)
    vision = network.bind({"params": params}).vision
    ours = vision(jnp.asarray(pixels))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs.vision_model(images, output_hidden_states=True)
        projected = theirs.visual_projection(expected.pooler_output)
    assert_close(ours.last, expected.last_hidden_state)
    assert_close(ours.penultimate, expected.hidden_states[-2])
    assert_close(ours.pooled, expected.pooler_output)
    assert_close(ours.projected, projected)


def test_logits_and_their_gradient(both, pixels):
    theirs, folder = both
    network, params = clip_weights.read(folder)
    ours = jax.jit(network.apply)({"params": params}, pixels, IDS)
    slope = jax.jit(
        jax.grad(lambda x: network.apply({"params": params}, x, jnp.asarray(IDS)).sum())
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).requires_grad_()
    out = theirs(pixel_values=images, input_ids=torch.from_numpy(IDS))
    expected = out.logits_per_image.diagonal()
    expected.sum().backward()
    assert_close(ours, expected)
    assert_close(slope(pixels), images.grad.permute(0, 2, 3, 1))


def test_bfloat16_keeps_statistics_in_fp32(both, pixels):
    """bf16 has 8 bits; three layers of it against fp32 weights of the same values."""
    theirs, folder = both
    network, params = clip_weights.read(folder, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ours = jax.jit(network.apply)({"params": params}, pixels, IDS)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=torch.from_numpy(IDS))
    assert ours.dtype == jnp.float32
    assert_close(ours, expected.logits_per_image.diagonal(), bar=0.05)


def test_files_go_round(both, tmp_path):
    """Written names, shapes and bits are those that transformers wrote."""
    theirs, folder = both
    _, params = clip_weights.read(folder)
    tensors.write(tmp_path / "model.safetensors", params, clip_weights.TABLE)
    wrote, had = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert wrote.keys() == had.keys()
    assert all(torch.equal(wrote[name], had[name]) for name in had)


REAL = {  # what the configs on the hub say; width, layers, heads, projection, act
    "clip-l": (768, 12, 12, 768, CLIP_L, 123_650_304),
    "clip-g": (1280, 32, 20, 1280, CLIP_G, 694_659_840),
}


@pytest.mark.parametrize("name", REAL)
def test_sizes_of_sd3(name):
    """Names, shapes and count of SD3's two text encoders on the meta device."""
    width, layers, heads, projection, act, count = REAL[name]
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=act,
        architectures=["CLIPTextModelWithProjection"],
    )
    with torch.device("meta"):
        theirs = transformers.CLIPTextModelWithProjection(config)
    ours = CLIPText(CLIPTextConfig.from_dict(config.to_dict()))
    like = clip_weights.text_shapes(ours)
    named = tensors.names(clip_weights.TEXT_TABLE, like)
    assert named == {k: tuple(v.shape) for k, v in theirs.named_parameters()}
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == count


def test_old_configs_say_it_twice():
    """transformers itself is the oracle of who wins."""
    values = dict(
        text_config={"hidden_size": 8, "eos_token_id": 2},
        text_config_dict={"hidden_size": 16},
        vision_config={"hidden_size": 24},
        projection_dim=4,
    )
    theirs = transformers.CLIPConfig(**values)
    ours = clip_weights.CLIPConfig.from_dict(values)
    assert ours.text.hidden_size == theirs.text_config.hidden_size == 16
    assert ours.text.eos_token_id == theirs.text_config.eos_token_id
    assert ours.vision.hidden_size == theirs.vision_config.hidden_size == 24


@pytest.mark.parametrize(
    "config, values, word",
    [
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act"),
        (CLIPTextConfig, {"eos_token_id": [1, 2]}, "eos_token_id"),
        (CLIPVisionConfig, {"image_size": [224, 112]}, "image_size"),
    ],
)
def test_configs_that_are_not_implemented(config, values, word):
    with pytest.raises(UserError, match=word):
        config.from_dict(values)


def test_longer_texts_than_positions():
    network = CLIPText(CLIPTextConfig.from_dict(TEXT))
    with pytest.raises(UserError, match="at most 9"):
        network.init(jax.random.key(0), jnp.zeros((1, 10), jnp.int32))


def test_a_missing_tensor_is_named(both, tmp_path):
    _, folder = both
    had = load_file(folder / "model.safetensors")
    del had["visual_projection.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(had, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="visual_projection.weight: missing"):
        clip_weights.read(tmp_path)
