"""The transformer of SD3 behind the protocol that all families share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from flowgrpo_jax.models import remat as policies
from flowgrpo_jax.models.denoiser import LatentShape
from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.sd3 import cost, sharding
from flowgrpo_jax.models.sd3.transformer import MMDiT
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig, adapted_layers
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class SD3Denoiser:
    """An `MMDiT` of this config; see `denoiser.Denoiser` for what each method is."""

    config: MMDiTConfig

    @property
    def dtype(self) -> DTypeLike:
        return self.config.dtype

    @property
    def attention(self) -> str:
        return self.config.attention

    @property
    def remat(self) -> str:
        return self.config.remat

    @property
    def lora_alpha(self) -> float:
        return self.config.lora_alpha

    @property
    def head_dim(self) -> int:
        return self.config.attention_head_dim

    @property
    def guidance(self) -> Literal["two_passes", "embedded"]:
        return "two_passes"

    @property
    def text_features(self) -> tuple[int, int]:
        return self.config.joint_attention_dim, self.config.pooled_projection_dim

    @property
    def sharding_rules(self) -> meshes.Rules:
        return sharding.SHARDING_RULES

    def with_options(
        self,
        *,
        attention: str | None = None,
        remat: str | None = None,
        dtype: DTypeLike | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: tuple[str, ...] | None = None,
    ) -> "SD3Denoiser":
        changes: dict[str, Any] = {
            "attention": attention,
            "remat": remat,
            "dtype": dtype,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
        }
        if lora_targets is not None:
            changes["lora_targets"] = adapted_layers(lora_targets)
        given = {name: value for name, value in changes.items() if value is not None}
        return SD3Denoiser(dataclasses.replace(self.config, **given))

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
        width = tokens * self.config.width * jnp.dtype(self.dtype).itemsize
        per_block = policies.POLICIES[self.remat].per_block
        return 1.0 * self.config.num_layers * per_block * width
