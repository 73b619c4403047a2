"""The transformer of FLUX.1 behind the protocol that all families share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgrpo_jax.models.configured import Configured
from flowgrpo_jax.models.denoiser import Guidance, LatentShape
from flowgrpo_jax.models.flux import cost, sharding
from flowgrpo_jax.models.flux.transformer import Flux
from flowgrpo_jax.models.flux.transformer_config import (
    PATCH,
    FluxConfig,
    adapted_layers,
)
from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class FluxDenoiser(Configured):
    """A `Flux` of this config; see `denoiser.Denoiser` for what each method is."""

    config: FluxConfig

    @property
    def guidance(self) -> Guidance:
        return "embedded" if self.config.guidance_embeds else "none"

    @property
    def sharding_rules(self) -> meshes.Rules:
        return sharding.SHARDING_RULES

    def adapted_layers(self, patterns: Sequence[str]) -> tuple[str, ...]:
        return adapted_layers(patterns)

    def init(self, key: Key[Array, ""], latents: LatentShape) -> Mapping[str, Any]:
        context, pooled = self.text_features
        return Flux(self.config).init(
            key,
            jnp.zeros((1, *latents)),
            jnp.ones(1),
            jnp.zeros((1, 1, context)),
            jnp.zeros((1, pooled)),
            jnp.ones(1),
        )

    def predict(
        self,
        collections: Mapping[str, Any],
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        text: TextEmbedding,
        guidance: float | None = None,
    ) -> Float[Array, "sample height width channel"]:
        scale = None if guidance is None else jnp.full(sigma.shape, guidance)
        network = Flux(self.config)
        answer = network.apply(
            collections, latents, sigma, text.context, text.pooled, scale
        )
        return jnp.asarray(answer)

    def tokens(self, latents: LatentShape) -> int:
        height, width, _ = latents
        return height * width // PATCH**2

    def cost(self, image_tokens: int, text_tokens: int) -> Pass:
        return cost.forward(self.config, image_tokens, text_tokens)

    def kept_bytes(self, tokens: int) -> float:
        blocks = self.config.num_layers + self.config.num_single_layers
        return self._kept_bytes(tokens, blocks)
