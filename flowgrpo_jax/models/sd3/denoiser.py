"""The transformer of SD3 behind the protocol that all families share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgrpo_jax.models.configured import Configured
from flowgrpo_jax.models.denoiser import LatentShape
from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.sd3 import cost, sharding
from flowgrpo_jax.models.sd3.transformer import MMDiT
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig, adapted_layers
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class SD3Denoiser(Configured):
    """An `MMDiT` of this config; see `denoiser.Denoiser` for what each method is."""

    config: MMDiTConfig

    @property
    def sharding_rules(self) -> meshes.Rules:
        return sharding.SHARDING_RULES

    def adapted_layers(self, patterns: Sequence[str]) -> tuple[str, ...]:
        return adapted_layers(patterns)

    def init(self, key: Key[Array, ""], latents: LatentShape) -> Mapping[str, Any]:
        context, pooled = self.text_features
        return MMDiT(self.config).init(
            key,
            jnp.zeros((1, *latents)),
            jnp.ones(1),
            jnp.zeros((1, 1, context)),
            jnp.zeros((1, pooled)),
        )

    def predict(
        self,
        collections: Mapping[str, Any],
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        text: TextEmbedding,
        guidance: float | None = None,
    ) -> Float[Array, "sample height width channel"]:
        del guidance  # two passes: it is not the network's
        network = MMDiT(self.config)
        answer = network.apply(collections, latents, sigma, text.context, text.pooled)
        return jnp.asarray(answer)

    def tokens(self, latents: LatentShape) -> int:
        height, width, _ = latents
        return height * width // self.config.patch_size**2

    def cost(self, image_tokens: int, text_tokens: int) -> Pass:
        return cost.forward(self.config, image_tokens, text_tokens)

    def kept_bytes(self, tokens: int) -> float:
        return self._kept_bytes(tokens, self.config.num_layers)
