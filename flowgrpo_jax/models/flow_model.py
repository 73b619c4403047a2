"""A text-to-image flow model as the rest of the package sees it.

`velocity(variables, latents, sigma, text)` is the only function that sampling and
learning call. `variables` is a dict of plain pytrees: `transformer`, `buffers` (what it
reads and never learns), `vae` or `text` where the model has one, and for a LoRA policy
`lora`; a role of GRPO (policy, reference, EMA) is such a dict.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgrpo_jax.flow import schedule
from flowgrpo_jax.models.denoiser import Denoiser, LatentShape
from flowgrpo_jax.models.text import PromptEncoders, TextEmbedding, Tokenizer
from flowgrpo_jax.runtime.resolution import Size

Variables = dict[str, Any]

Text = TextEmbedding | Int[Array, "prompt token"]
# Of (variables, latents, sigma, text, text of the empty prompt).
GuidedVelocity = Callable[..., Array]
# A predicted clean sample is turned into a velocity by dividing by sigma; near 0 that
# would amplify the last errors.
MIN_SIGMA = 0.05


def overlay(base: Variables, part: Variables) -> Variables:
    """`base` with the leaves of `part`, a subtree or an addition, over its own."""
    merged = dict(base)
    for name, value in part.items():
        inner = isinstance(value, dict) and name in base
        merged[name] = overlay(base[name], value) if inner else value
    return merged


def without(base: Variables, part: Variables) -> Variables:
    """The leaves of `base` that are not leaves of `part`; `overlay` brings them back."""
    rest = {}
    for name, value in base.items():
        if name not in part:
            rest[name] = value
        elif isinstance(value, dict) and (inner := without(value, part[name])):
            rest[name] = inner
    return rest


def decoding(variables: Variables) -> Variables:
    """The part of `variables` (or of their specs) that `FlowModel.decode` reads."""
    return {name: tree for name, tree in variables.items() if name == "vae"}


@functools.partial(jax.jit, static_argnums=(0, 5))
def _predict(denoiser: Denoiser, collections, latents, sigma, text, guidance):
    """The network, traced once for all programs that ask it about these shapes."""
    return denoiser.predict(collections, latents, sigma, text, guidance)


Images = Float[Array, "sample height width channel"]
Latents = Float[Array, "sample row column latent"]


@runtime_checkable
class Autoencoder(Protocol):
    """Images in [0, 1] to latents and back, with weights of its own or none."""

    @property
    def downscale(self) -> int:
        """Pixels along one side of what becomes one latent pixel."""
        ...

    def encode(self, params: Variables, images: Images) -> Latents: ...

    def decode(self, params: Variables, latents: Latents) -> Images: ...

    def decode_operations(self, rows: int, columns: int) -> float:
        """Floating-point operations of decoding a latent of this size."""
        ...


@dataclasses.dataclass(frozen=True)
class IdentityAutoencoder:
    """Latents are pixels in [-1, 1]; no weights."""

    @property
    def downscale(self) -> int:
        return 1

    def encode(self, params: Variables, images: Images) -> Latents:
        """Images in [0, 1] to latents."""
        return 2.0 * images - 1.0

    def decode(self, params: Variables, latents: Latents) -> Images:
        """Latents to images in [0, 1]."""
        return jnp.clip(0.5 * latents + 0.5, 0.0, 1.0)

    def decode_operations(self, rows: int, columns: int) -> float:
        return 0.0


@dataclasses.dataclass(frozen=True)
class Shift:
    """How a model's own scheduler moves the sigmas of its steps towards noise.

    The steps are even on the scheduler's grid before that (`grid`), or from 1 to
    1 / num_steps, as pipelines that give their sigmas themselves have them ("even").
    """

    value: float = 3.0
    dynamic: bool = False  # one that depends on the image's size
    steps: Literal["grid", "even"] = "grid"


@dataclasses.dataclass(frozen=True)
class FlowModel:
    """Networks and their conventions; the weights are passed in as `variables`."""

    name: str
    denoiser: Denoiser
    autoencoder: Autoencoder
    latent_shape: LatentShape
    text_tokens: int  # of one prompt, as the denoiser sees it
    # Text: an encoder that is small enough to learn beside the transformer, or ones
    # that are too large to stay in memory.
    text_encoder: nn.Module | None = None
    tokenizer: Tokenizer | None = None
    prompts: PromptEncoders | None = None
    predicts: Literal["velocity", "sample"] = "velocity"  # or the clean latent
    shift: Shift = Shift()
    transformer_path: str = ""  # of its weights, if not in the folder of the others

    @property
    def size(self) -> Size:
        """Of the pictures, in pixels."""
        height, width = (
            side * self.autoencoder.downscale for side in self.latent_shape[:2]
        )
        return Size(height, width)

    @property
    def image_tokens(self) -> int:
        return self.denoiser.tokens(self.latent_shape)

    def sigmas(self, num_steps: int, shift: float = 0.0) -> schedule.Sigmas:
        """Sigmas [node] of the model's own scheduler, or of one with this shift."""
        own = (
            self.shift
            if not shift
            else dataclasses.replace(self.shift, value=shift, dynamic=False)
        )
        if own.steps == "even":
            return schedule.shifted(num_steps, own.value)
        return schedule.shifted_grid(num_steps, own.value, own.dynamic)

    def text_shape(self) -> TextEmbedding:
        """Shapes [1, ...] of one prompt's embedding."""
        context, pooled = self.denoiser.text_features
        dtype = jnp.dtype(jnp.float32 if self.tokenizer else self.denoiser.dtype)
        return TextEmbedding(
            jax.ShapeDtypeStruct((1, self.text_tokens, context), dtype),
            jax.ShapeDtypeStruct((1, pooled), dtype),
        )

    def encode(self, variables: Variables, images: Images) -> Latents:
        """Images in [0, 1] to clean latents."""
        return self.autoencoder.encode(variables.get("vae", {}), images)

    def decode(self, variables: Variables, latents: Latents) -> Images:
        """Clean latents to images in [0, 1]."""
        return self.autoencoder.decode(variables.get("vae", {}), latents)

    def velocity(
        self,
        variables: Variables,
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        text: Text,
        guidance: float | None = None,
    ) -> Float[Array, "sample height width channel"]:
        """Flow velocity (noise minus data) in fp32; `sigma` in [0, 1], 1 is noise.

        With `lora` in `variables` the adapted network answers, else the base. `text`
        may be token ids: the encoder in `variables` then takes part in the gradient.
        `guidance` is for networks that read it.
        """
        if not isinstance(text, TextEmbedding):
            text = self.encode_text(variables, text)
        denoiser = self.denoiser
        collections = {"params": variables["transformer"]}
        if "buffers" in variables:
            collections["buffers"] = variables["buffers"]
        if "lora" in variables:
            collections["lora"] = variables["lora"]
        else:
            denoiser = denoiser.with_options(lora_rank=0)
        answer = _predict(denoiser, collections, latents, sigma, text, guidance)
        out = jnp.asarray(answer, jnp.float32)
        if self.predicts == "velocity":
            return out
        scale = jnp.maximum(sigma, MIN_SIGMA)[:, None, None, None]
        return (latents - out) / scale

    def guided(self, scale: float) -> GuidedVelocity:
        """The velocity under guidance of this scale; 1 is none.

        The result takes the text of every sample and the embedding of the empty prompt
        (one row), which only a network that is asked twice looks at. One that takes no
        guidance answers alike at every scale, as its pipeline in diffusers does.
        """
        if self.denoiser.guidance == "two_passes":
            return guided(self.velocity, scale)

        told = scale if self.denoiser.guidance == "embedded" else None

        def once(variables, latents, sigma, text, empty):
            del empty
            return self.velocity(variables, latents, sigma, text, told)

        return once

    def passes(self, scale: float) -> int:
        """How often the network is asked for one velocity of this guidance."""
        return 2 if self.denoiser.guidance == "two_passes" and scale != 1.0 else 1

    def encode_text(
        self, variables: Variables, ids: Int[Array, "prompt token"]
    ) -> TextEmbedding:
        """Embed token ids (see `tokenizer`)."""
        assert self.text_encoder is not None
        answer = self.text_encoder.apply({"params": variables["text"]}, ids)
        return cast(TextEmbedding, answer)

    def init(self, key: Array, lora: bool = False) -> Variables:
        """Fresh random variables of the networks that learn.

        Transformer and text encoder, or with `lora` the adapter alone.
        """
        text_key, key = jax.random.split(key)
        if lora:
            return {"lora": self.denoiser.init(key, self.latent_shape)["lora"]}
        base = self.denoiser.with_options(lora_rank=0)
        made = {"transformer": base.init(key, self.latent_shape)["params"]}
        if self.text_encoder is not None and self.tokenizer is not None:
            ids = jnp.asarray(self.tokenizer([""]))
            made["text"] = self.text_encoder.init(text_key, ids)["params"]
        return made


def guided(velocity: Callable[..., Array], scale: float) -> GuidedVelocity:
    """Classifier-free guidance as one doubled batch: v_0 + scale * (v_text - v_0).

    The result takes the text of every sample and the embedding of the empty prompt
    (one row). At scale 1 the second half is left out.
    """

    def guided_velocity(variables, latents, sigma, text, empty):
        if scale == 1.0:
            return velocity(variables, latents, sigma, text)
        with_text, without = with_and_without_text(
            velocity, variables, latents, sigma, text, empty
        )
        return without + scale * (with_text - without)

    return guided_velocity


def with_and_without_text(
    velocity: Callable[..., Array], variables, latents, sigma, text, empty
) -> tuple[Array, Array]:
    """Velocities with every sample's text and with the empty one, as one batch."""
    samples = latents.shape[0]
    both = jax.tree.map(
        lambda given, none: jnp.concatenate(
            [given, jnp.broadcast_to(none, given.shape)]
        ),
        text,
        empty,
    )
    doubled = velocity(
        variables, jnp.tile(latents, (2, 1, 1, 1)), jnp.tile(sigma, 2), both
    )
    return doubled[:samples], doubled[samples:]
