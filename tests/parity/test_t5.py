"""The T5 encoder against transformers' T5EncoderModel (torch, fp32), random weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.encoders import t5
from flowgrpo_jax.models.encoders.t5 import T5Config, T5Encoder
from flowgrpo_jax.models.files import tensors
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import randomize

TOKENS = 150  # further apart than the largest distance that has its own bucket


def model(feed_forward_proj: str) -> T5EncoderModel:
    """Heads that do not add up to the width, as in small T5 v1.1 models."""
    config = TheirConfig(
        vocab_size=50,
        d_model=24,
        d_kv=16,
        d_ff=40,
        num_layers=3,
        num_heads=2,
        feed_forward_proj=feed_forward_proj,
    )
    torch.manual_seed(0)
    return randomize(T5EncoderModel(config))


@pytest.fixture(scope="module", params=["gated-gelu", "relu"])
def pair(request, tmp_path_factory):
    """(torch model, our network, our parameters)"""
    theirs, folder = model(request.param), tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    network = T5Encoder(T5Config.from_folder(folder))
    start = jnp.zeros((1, 4), jnp.int32)
    like = jax.eval_shape(network.init, jax.random.key(0), start)["params"]
    return theirs, network, tensors.read(folder, t5.TABLE, like, t5.IGNORE)


@pytest.fixture
def ids() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 50)


def as_torch(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def test_states(pair, ids):
    theirs, network, params = pair
    with torch.no_grad():
        expected = theirs(as_torch(ids).long()).last_hidden_state
    assert_close(jax.jit(network.apply)({"params": params}, ids), expected)


def test_states_under_a_mask(pair, ids):
    """Tokens behind the end of a prompt; the states of the others are compared."""
    theirs, network, params = pair
    mask = jnp.arange(TOKENS) < jnp.array([[TOKENS], [60]])
    with torch.no_grad():
        expected = theirs(as_torch(ids).long(), as_torch(mask)).last_hidden_state
    ours = jax.jit(network.apply)({"params": params}, ids, mask)
    assert_close(ours[mask], expected[as_torch(mask)])
    unmasked = jax.jit(network.apply)({"params": params}, ids)
    assert np.abs(ours - unmasked)[1, :60].max() > 0.01


def test_bfloat16_stays_near(pair, ids):
    """Oracle: our fp32; the states are normalised, so of a size of 1."""
    _, network, params = pair
    half = T5Encoder(dataclasses.replace(network.config, dtype=jnp.bfloat16))
    states = jax.jit(half.apply)({"params": params}, ids)
    assert states.dtype == jnp.bfloat16
    exact = jax.jit(network.apply)({"params": params}, ids)
    assert 0 < np.abs(states.astype(jnp.float32) - exact).mean() < 0.05


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (16, 40), (32, 64)])
def test_buckets(buckets, furthest):
    """Oracle: transformers' own buckets, of every distance up to 600."""
    config = T5Config(
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=furthest,
    )
    place = torch.arange(600)
    expected = T5Attention._relative_position_bucket(
        place[None] - place[:, None], num_buckets=buckets, max_distance=furthest
    )
    np.testing.assert_array_equal(t5.position_buckets(config, 600), expected)


@pytest.mark.parametrize(
    "key, value",
    [
        ("feed_forward_proj", "gated-silu"),
        ("model_type", "umt5"),
        ("layer_norm_epsilon", 1e-5),
        ("num_layers", "three"),
        ("num_heads", 0),
        ("dense_act_fn", "relu2"),
        ("is_gated_act", True),
        ("quantization_config", {"load_in_8bit": True}),
        ("use_flash_bias", True),
        ("relative_attention_num_buckets", 2),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, key, value):
    model("relu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"model: {path}: {key}: "):
        T5Config.from_folder(tmp_path)
