"""The model as the package sees it: velocity, guidance, text, pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.models.flow_model import (
    MIN_SIGMA,
    IdentityAutoencoder,
    guided,
    overlay,
    without,
)
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.worlds.sprites import model as sprites_model
from tests import tiny, toy

SIGMA = np.array([1.0, 0.5, 0.04, 0.0], np.float32)
PROMPTS = ["a red circle", "two rings", "", "a ring above a cross"]


tiny_model = functools.cache(tiny.tiny_model)


def latents_of(model):
    rng = np.random.default_rng(0)
    return rng.standard_normal((len(SIGMA), *model.latent_shape)).astype(np.float32)


def test_sample_prediction():
    """Closed form: (latent - clean) / max(sigma, MIN_SIGMA) of the network's answer."""
    model, variables = tiny_model()
    plain = dataclasses.replace(model, predicts="velocity")
    latents, ids = latents_of(model), model.tokenizer(PROMPTS)
    clean = np.asarray(jax.jit(plain.velocity)(variables, latents, SIGMA, ids))
    found = jax.jit(model.velocity)(variables, latents, SIGMA, ids)
    divisor = np.array([1.0, 0.5, MIN_SIGMA, MIN_SIGMA]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found, (latents - clean) / divisor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("predicts", ["sample", "velocity"])
def test_velocity_is_fp32(dtype, predicts):
    """Oracle: the type rules; whatever the network computes in."""
    model, variables = tiny_model()
    network = model.denoiser.with_options(dtype=dtype)
    model = dataclasses.replace(model, denoiser=network, predicts=predicts)
    answer = jax.eval_shape(
        model.velocity,
        variables,
        latents_of(model),
        SIGMA,
        jnp.asarray(model.tokenizer(PROMPTS)),
    )
    assert answer.dtype == jnp.float32
    assert answer.shape == (len(SIGMA), *model.latent_shape)


def test_ids_are_embedded_on_the_way():
    """Oracle: an invariance; ids and their embedding give the same velocity."""
    model, variables = tiny_model()
    ids, latents = model.tokenizer(PROMPTS), latents_of(model)
    velocity = jax.jit(model.velocity)
    text = jax.jit(model.encode_text)(variables, ids)
    np.testing.assert_allclose(
        velocity(variables, latents, SIGMA, text),
        velocity(variables, latents, SIGMA, ids),
        rtol=1e-5,
        atol=1e-5,
    )


def test_init():
    """Oracle: the contract; variables by role, and a fresh model answers zero."""
    model = sprites_model.make_model(tiny.SIZE, lora_rank=2, lora_alpha=4.0)
    init = functools.partial(model.init, jax.random.key(0))
    assert set(jax.eval_shape(functools.partial(init, lora=True))) == {"lora"}
    variables = jax.jit(init)()
    assert set(variables) == {"transformer", "text"}
    plain = dataclasses.replace(model, predicts="velocity")
    answer = jax.jit(plain.velocity)(
        variables, latents_of(model), SIGMA, model.tokenizer(PROMPTS)
    )
    assert (answer == 0).all()


def test_overlay_and_without():
    """Oracle: the definition, by hand; what one takes away the other brings back."""
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    part = {"a": {"y": {"z": 5}}}
    assert overlay(base, part) == {"a": {"x": 1, "y": {"z": 5}}, "b": 3}
    assert without(base, part) == {"a": {"x": 1}, "b": 3}
    assert overlay(without(base, part), part) == overlay(base, part)
    assert overlay(base, {"lora": {"x": 9}}) == base | {"lora": {"x": 9}}
    assert without(base, {"lora": {"x": 9}}) == base
    assert without(base, base) == {}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}  # not changed in place


# -- guidance ----------------------------------------------------------------------


def stub(batches):
    """A velocity in closed form that notes the size of its batches."""

    def velocity(variables, latents, sigma, text):
        batches.append(len(latents))
        change = sigma[:, None] * text.pooled + text.context.sum(axis=(1, 2))[:, None]
        return variables["gain"] * latents + change[:, None, None, :]

    return velocity


def guidance_inputs():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    text = TextEmbedding(context=normal(3, 2, 5), pooled=normal(3, 4))
    empty = TextEmbedding(context=normal(1, 2, 5), pooled=normal(1, 4))
    sigma = np.array([1.0, 0.6, 0.1], np.float32)
    return {"gain": 1.5}, normal(3, 6, 6, 4), sigma, text, empty


@pytest.mark.parametrize("scale", [0.0, 2.5, 4.5])
def test_guided(scale):
    """Closed form: v_0 + scale * (v_text - v_0), one call of twice the batch."""
    batches: list[int] = []
    variables, latents, sigma, text, empty = guidance_inputs()
    found = guided(stub(batches), scale)(variables, latents, sigma, text, empty)
    assert batches == [6]
    rows = jax.tree.map(lambda row: np.repeat(row, 3, axis=0), empty)
    with_text = stub([])(variables, latents, sigma, text)
    without = stub([])(variables, latents, sigma, rows)
    np.testing.assert_allclose(
        found, without + scale * (with_text - without), rtol=1e-5, atol=1e-5
    )


def test_scale_one_is_not_doubled():
    """Oracle: the contract; one call of the batch as it is, bit for bit."""
    batches: list[int] = []
    variables, latents, sigma, text, empty = guidance_inputs()
    found = guided(stub(batches), 1.0)(variables, latents, sigma, text, empty)
    assert batches == [3]
    np.testing.assert_array_equal(found, stub([])(variables, latents, sigma, text))


def test_identity_autoencoder():
    """Closed form: 2x - 1 and back, clipped to [0, 1]."""
    images = jnp.asarray(np.random.default_rng(0).random((2, 3, 3, 3), np.float32))
    coder = IdentityAutoencoder()
    latents = coder.encode({}, images)
    np.testing.assert_allclose(latents, 2 * images - 1)
    np.testing.assert_allclose(coder.decode({}, latents), images, atol=1e-6)
    far = coder.decode({}, jnp.full((1, 1, 1, 3), 7.0))
    np.testing.assert_array_equal(far, np.ones((1, 1, 1, 3)))


class Distilled(toy.ToyDenoiser):
    """One that takes no guidance, and is told none."""

    guidance = "none"

    def predict(self, collections, latents, sigma, text, guidance=None):
        assert guidance is None
        return super().predict(collections, latents, sigma, text)


def test_a_network_without_guidance_answers_alike_at_every_scale():
    """Oracle: the velocity itself, one pass, one column of an evaluation."""
    model = dataclasses.replace(toy.MODEL, denoiser=Distilled())
    latents, sigma = jnp.ones((2, 1, 1, 2)), jnp.asarray(SIGMA[:2])
    text = TextEmbedding(np.zeros((2, 8, 1), np.float32), np.zeros((2, 1), np.float32))
    plain = model.velocity(toy.VARIABLES, latents, sigma, text)
    for scale in (1.0, 3.5):
        found = model.guided(scale)(toy.VARIABLES, latents, sigma, text, text)
        np.testing.assert_array_equal(found, plain)
        assert model.passes(scale) == 1
    config = configs.make(eval__guidance_scale=3.5)
    assert list(specs.eval_spec(config, model).columns) == [metric_names.GUIDED]
    both = [metric_names.GUIDED, metric_names.UNGUIDED]
    assert list(specs.eval_spec(config, toy.MODEL).columns) == both
