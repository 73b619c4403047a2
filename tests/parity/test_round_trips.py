"""Every component of a pipeline: what diffusers wrote, read and written back here.

Oracle: the tensors of the folder, bit for bit, and the classes that wrote it.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as TheirT5Config

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import vae
from flowgrpo_jax.models.encoders import clip, clip_weights, t5
from flowgrpo_jax.models.files import tensors
from tests.parity.tiny_sd3 import write_pipeline


def vae_shapes(config: vae.VAEConfig) -> dict:
    return vae.VAE(config).shapes()


def t5_shapes(config: t5.T5Config) -> dict:
    network, ids = t5.T5Encoder(config), jnp.zeros((1, 1), int)
    return jax.eval_shape(network.init, jax.random.key(0), ids)["params"]


def clip_shapes(config: clip.CLIPTextConfig) -> dict:
    return clip_weights.text_shapes(clip.CLIPText(config))


# Folder: configuration, shapes of our tree, rename table, tensors to ignore, class of
# the folder and a tensor to damage.
COMPONENTS = {
    "vae": (
        vae.VAEConfig,
        vae_shapes,
        vae.TABLE,
        (),
        AutoencoderKL,
        "decoder.conv_in.weight",
    ),
    "text_encoder": (
        clip.CLIPTextConfig,
        clip_shapes,
        clip_weights.TEXT_TABLE,
        clip_weights.IGNORE,
        CLIPTextModelWithProjection,
        "text_model.encoder.layers.2.self_attn.k_proj.bias",
    ),
    "text_encoder_3": (
        t5.T5Config,
        t5_shapes,
        t5.TABLE,
        t5.IGNORE,
        T5EncoderModel,
        "encoder.block.1.layer.0.SelfAttention.q.weight",
    ),
}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder)
    return folder


@pytest.fixture(params=COMPONENTS)
def component(request, pipeline_folder):
    """(folder, shapes, table, ignored, class, tensor)"""
    folder = pipeline_folder / request.param
    config, shapes, *rest = COMPONENTS[request.param]
    return folder, shapes(config.from_folder(folder)), *rest


def weights(folder) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**4])
def test_what_is_read_is_written(component, tmp_path, max_shard_bytes):
    folder, like, table, ignored, their_class, _ = component
    tree = tensors.read(folder, table, like, ignored)
    config = json.loads((folder / "config.json").read_text())
    tensors.write(tmp_path, tree, table, config, max_shard_bytes)
    again = tensors.read(tmp_path, table, like, ignored)
    jax.tree.map(np.testing.assert_array_equal, again, tree)

    expected, written = weights(folder), weights(tmp_path)
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    theirs = their_class.from_pretrained(tmp_path, local_files_only=True)
    for name, value in theirs.state_dict().items():
        if name in expected:  # T5 has its embedding under two names
            np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)


def missing(found, name):
    del found[name]
    return name


def extra(found, name):
    found[f"{name}_2"] = found[name]
    return f"{name}_2"


def wrong_shape(found, name):
    found[name] = found[name][:-1]
    return name


@pytest.mark.parametrize("damage", [missing, extra, wrong_shape])
def test_damage_is_named(component, tmp_path, damage):
    folder, like, table, ignored, _, name = component
    found = weights(folder)
    named = damage(found, name)
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {named}: ") as error:
        tensors.read(tmp_path, table, like, ignored)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named(component, tmp_path):
    folder, like, table, ignored, _, _ = component
    file = next(folder.glob("*.safetensors"))
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"weights: {cut}: tensor \\S+: "):
        tensors.read(tmp_path, table, like, ignored)


def real_vae() -> AutoencoderKL:
    """By the values of vae/config.json of stable-diffusion-3.5-medium."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def real_t5() -> T5EncoderModel:
    """By the values of text_encoder_3/config.json of stable-diffusion-3.5-medium."""
    return T5EncoderModel(
        TheirT5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


@pytest.mark.parametrize(
    "make, shapes, config, table, count",
    [
        (real_vae, vae_shapes, vae.SD3, vae.TABLE, 83_819_683),
        (real_t5, t5_shapes, t5.XXL, t5.TABLE, 4_762_310_656),
    ],
)
def test_real_sizes(make, shapes, config, table, count):
    """Oracle: names and shapes of the classes themselves, on torch's meta device."""
    with torch.device("meta"):
        theirs = make()
    assert type(config).from_dict(config_of(theirs)) == config
    expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    assert tensors.names(table, shapes(config)) == expected
    assert sum(map(math.prod, expected.values())) == count


def config_of(model) -> dict:
    """What `save_pretrained` would write as config.json."""
    writer = model.config if isinstance(model, T5EncoderModel) else model
    return json.loads(writer.to_json_string())
