"""A flow of two numbers whose velocity is known in closed form, behind FlowModel's seam.

Data are Gaussian, N(mean, STD^2); the mean is all that learns. So every algorithm runs
in milliseconds, and its reward and gradient have values that can be reasoned about.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import rewards
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.config import checks
from flowgrpo_jax.models.flow_model import FlowModel, IdentityAutoencoder
from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.worlds.text import WordTokenizer
from tests.tiny_run import use

STD = 0.5
TARGET = np.array([1.0, 0.5])
BEST = -2 * STD**2  # reward of the policy whose mean is the target


@dataclass(frozen=True)
class Plain(IdentityAutoencoder):
    """Latents are what is rewarded."""

    def encode(self, params, images):
        return images

    def decode(self, params, latents):
        return latents


@dataclass(frozen=True)
class ToyDenoiser:
    """E[noise - data | latents] for x = (1 - sigma) data + sigma noise: the protocol of
    `Denoiser` without a network."""

    dtype = np.float32
    attention, remat, guidance = "none", "none", "two_passes"
    lora_alpha, head_dim, text_features = 0.0, 1, (1, 1)
    sharding_rules = ()

    def with_options(self, **options):
        return self

    def init(self, key, latents):
        return {"params": {"mean": jnp.zeros(2)}}

    def predict(self, collections, latents, sigma, text, guidance=None):
        mean = collections["params"]["mean"]
        t = sigma[:, None, None, None]
        off = latents - (1 - t) * mean
        spread = (1 - t) ** 2 * STD**2 + t**2
        return (t - (1 - t) * STD**2) / spread * off - mean

    def tokens(self, latents):
        return 1

    def cost(self, image_tokens, text_tokens):
        return Pass(4.0, 0.0)

    def kept_bytes(self, tokens):
        return 8.0


class NoText(nn.Module):
    """The text says nothing."""

    @nn.compact
    def __call__(self, ids):
        blank = jnp.zeros((*ids.shape, 1))
        return TextEmbedding(context=blank, pooled=blank[:, 0])


MODEL = FlowModel(
    name="toy",
    denoiser=ToyDenoiser(),
    text_encoder=NoText(),
    tokenizer=WordTokenizer(("word",)),
    text_tokens=8,
    autoencoder=Plain(),
    latent_shape=(1, 1, 2),
)
VARIABLES = {"transformer": {"mean": np.zeros(2, np.float32)}, "text": {}}


def reward(images, prompts):
    """Minus the squared distance to the target."""
    del prompts
    near = -np.square(images.reshape(len(images), 2) - TARGET).sum(axis=1)
    return {"geneval": near}


def make_run(monkeypatch, recipe: str, scores=reward, **values) -> assembled.Run:
    """A run of a recipe on the toy; `values` are config values."""
    use(monkeypatch, scores)
    monkeypatch.setattr(assembled, "starting_model", lambda *_: (MODEL, VARIABLES))
    monkeypatch.setattr(rewards, "world_of", lambda config: None)
    config = configs.make(
        recipe=recipe,
        mesh__data=values.pop("mesh__data", 1),
        train__use_lora=False,
        train__adam_eps=1e-12,
        train__weight_decay=0.0,
        sample__guidance_scale=1.0,
        eval__guidance_scale=1.0,
        **values,
    )
    checks.check(config)
    return assembled.Run(config)
