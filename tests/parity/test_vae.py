"""The autoencoder against diffusers' AutoencoderKL (torch, fp32), random weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Theirs

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.vae import TABLE, VAE, VAEConfig
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import randomize
from tests.parity.tiny_sd3 import vae as tiny_sd3_vae

SQUARE, WIDE = (32, 32), (16, 48)


def stable_diffusion_1() -> Theirs:
    """Quant convolutions, no shift, other widths and depths, no middle attention."""
    return Theirs(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(6, 12),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=3,
        mid_block_add_attention=False,
    )


CASES = [
    pytest.param((tiny_sd3_vae, WIDE), id="sd3-wide"),
    pytest.param((stable_diffusion_1, SQUARE), id="sd1-square"),
]


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """(torch model, ours, our parameters, size of the images)"""
    make, size = request.param
    torch.manual_seed(0)
    theirs, folder = randomize(make()), tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    ours = VAE(VAEConfig.from_folder(folder))
    return theirs, ours, tensors.read(folder, TABLE, ours.shapes()), size


def picture(size) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((2, *size, 3), np.float32))


def as_torch(images) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def their_scaling(model: Theirs) -> tuple[float, float]:
    return model.config.scaling_factor, model.config.shift_factor or 0.0


def their_latents(model: Theirs, images: jax.Array) -> torch.Tensor:
    """As diffusers' image-to-image pipelines encode: the mode, shifted and scaled."""
    scale, shift = their_scaling(model)
    with torch.no_grad():
        mode = model.encode(2 * as_torch(images) - 1).latent_dist.mode()
    return ((mode - shift) * scale).permute(0, 2, 3, 1)


def their_images(model: Theirs, latents: torch.Tensor) -> torch.Tensor:
    """As StableDiffusion3Pipeline decodes, and its image processor after it."""
    scale, shift = their_scaling(model)
    decoded = model.decode(latents.permute(0, 3, 1, 2) / scale + shift).sample
    return (0.5 * decoded + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_encode(pair):
    theirs, ours, params, size = pair
    latents = jax.jit(ours.encode)(params, picture(size))
    assert_close(latents, their_latents(theirs, picture(size)))


def latents_of(ours: VAE, size) -> jax.Array:
    cfg = ours.config
    shape = (2, *(side // cfg.downscale for side in size), cfg.latent_channels)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_decode_and_its_gradient(pair):
    """The gradient is that of a random weighting of the pixels."""
    theirs, ours, params, size = pair
    latents, weight = latents_of(ours, size), picture(size)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_images(latents):
        images = ours.decode(params, latents)
        return (images * weight).sum(), images

    gradient, images = gradient_and_images(latents)
    their_input = torch.from_numpy(np.array(latents)).requires_grad_()
    expected = their_images(theirs, their_input)
    (expected * torch.from_numpy(np.array(weight))).sum().backward()
    assert_close(images, expected)
    assert_close(gradient, their_input.grad)


@pytest.mark.parametrize("pair", CASES[-1:], indirect=True)
def test_a_sample_is_the_mean_plus_noise_of_the_posterior(pair):
    """Oracle: diffusers' posterior; the noise is drawn again with the same key."""
    theirs, ours, params, size = pair
    key, images = jax.random.key(3), picture(size)
    latents = jax.jit(ours.encode)(params, images, key)
    noise = jax.random.normal(key, latents.shape)
    scale, shift = their_scaling(theirs)
    with torch.no_grad():
        posterior = theirs.encode(2 * as_torch(images) - 1).latent_dist
    expected = posterior.mean + posterior.std * as_torch(noise)
    assert_close(latents, ((expected - shift) * scale).permute(0, 2, 3, 1))


@pytest.mark.parametrize("pair", CASES[-1:], indirect=True)
def test_bfloat16_stays_near(pair):
    """Oracle: our fp32. Images in [0, 1] within a few steps of half precision."""
    _, ours, params, size = pair
    half = VAE(dataclasses.replace(ours.config, dtype=jnp.bfloat16))
    latents = latents_of(ours, size)
    images = jax.jit(half.decode)(params, latents)
    assert images.dtype == jnp.float32
    error = np.abs(images - jax.jit(ours.decode)(params, latents))
    assert 0 < error.mean() < 0.01


def test_size_that_is_no_whole_number_of_latents():
    ours = VAE(VAEConfig(block_out_channels=(32, 32)))
    with pytest.raises(UserError, match="resolution: 33x32: .* multiples of 2"):
        ours.encode({}, jnp.zeros((1, 33, 32, 3)))


@pytest.mark.parametrize(
    "key, value",
    [
        ("act_fn", "relu"),
        ("latents_mean", [0.0] * 16),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("_class_name", "AutoencoderKLWan"),
        ("scaling_factor", "large"),
        ("scaling_factor", 0.0),
        ("scaling_factor", float("nan")),
        ("scaling_factor", None),
        ("shift_factor", "none"),
        ("block_out_channels", [8, 8, "16", 16]),
        ("block_out_channels", [0, 0, 0, 0]),
        ("block_out_channels", [8, 8, 10, 16]),
        ("layers_per_block", 10**9),
        ("tile_overlap_factor", 0.25),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, key, value):
    tiny_sd3_vae().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"model: {path}: {key}: "):
        VAEConfig.from_folder(tmp_path)


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match="config.json: cannot be read"):
        VAEConfig.from_folder(tmp_path)
