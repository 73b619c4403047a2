"""What the denoisers of all families answer from their config alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from flowgrpo_jax.models import remat as policies
from flowgrpo_jax.models.denoiser import Guidance


@dataclasses.dataclass(frozen=True)
class Configured:
    """The half of `denoiser.Denoiser` that reads fields which all configs have."""

    config: Any

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
    def guidance(self) -> Guidance:
        return "two_passes"

    @property
    def text_features(self) -> tuple[int, int]:
        return self.config.joint_attention_dim, self.config.pooled_projection_dim

    def adapted_layers(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Our layers that LoRA patterns name; see `layer_names.adapted`."""
        raise NotImplementedError

    def with_options(
        self,
        *,
        attention: str | None = None,
        remat: str | None = None,
        dtype: DTypeLike | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: tuple[str, ...] | None = None,
    ) -> Any:  # of its own class; Self is more than the tests' type checks take
        changes: dict[str, Any] = {
            "attention": attention,
            "remat": remat,
            "dtype": dtype,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
        }
        if lora_targets is not None:
            changes["lora_targets"] = self.adapted_layers(lora_targets)
        given = {name: value for name, value in changes.items() if value is not None}
        return type(self)(dataclasses.replace(self.config, **given))

    def _kept_bytes(self, tokens: int, blocks: int) -> float:
        """Of so many blocks, by the arrays [token, width] that `remat` keeps of each.

        And of those of the block whose gradient is being computed.
        """
        width = tokens * self.config.width * jnp.dtype(self.dtype).itemsize
        kept = blocks * policies.POLICIES[self.remat].per_block
        return (kept + policies.IN_ONE_BLOCK) * width
