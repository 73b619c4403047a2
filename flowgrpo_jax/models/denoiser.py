"""The network of a flow model as the rest of the package asks it: one protocol.

Every family (`models/<family>/`) has a class that does this. Instances are frozen and
hashable: they are static arguments of compiled programs.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from flowgrpo_jax.models.operations import Pass
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime import mesh as meshes

# Guidance asks the network twice, or is a number that it reads; a network that was
# distilled for few steps takes none.
Guidance = Literal["two_passes", "embedded", "none"]
LatentShape = tuple[int, int, int]  # height, width, channels


@runtime_checkable
class Denoiser(Protocol):
    """A transformer that answers with a velocity or a clean sample, without weights."""

    @property
    def dtype(self) -> DTypeLike:
        """Of matmuls and the residual stream."""
        ...

    @property
    def attention(self) -> str:
        """One of `attention.KINDS`."""
        ...

    @property
    def remat(self) -> str:
        """One of `remat.POLICIES`."""
        ...

    @property
    def lora_alpha(self) -> float: ...

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        ...

    @property
    def guidance(self) -> Guidance:
        """How it is guided; see `Guidance`."""
        ...

    @property
    def text_features(self) -> tuple[int, int]:
        """Features of a text token and of the pooled vector."""
        ...

    @property
    def sharding_rules(self) -> meshes.Rules:
        """Which axis of a parameter, by its path, is split over `fsdp`."""
        ...

    def with_options(
        self,
        *,
        attention: str | None = None,
        remat: str | None = None,
        dtype: DTypeLike | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: tuple[str, ...] | None = None,
    ) -> "Denoiser":
        """The same network, carried out or adapted otherwise; None leaves an option.

        `lora_targets`: regular expressions of the ends of diffusers' module names, as
        in `train.lora_targets`; UserError for one that no layer matches.
        """
        ...

    def init(self, key: Key[Array, ""], latents: LatentShape) -> Mapping[str, Any]:
        """Fresh collections: "params", and "lora" where the rank is not 0."""
        ...

    def predict(
        self,
        collections: Mapping[str, Any],
        latents: Float[Array, "sample height width channel"],
        sigma: Float[Array, " sample"],
        text: TextEmbedding,
        guidance: float | None = None,
    ) -> Float[Array, "sample height width channel"]:
        """What the network answers; `guidance` is for those that read it."""
        ...

    def tokens(self, latents: LatentShape) -> int:
        """Image tokens of one latent."""
        ...

    def cost(self, image_tokens: int, text_tokens: int) -> Pass:
        """Operations of one forward pass of one image."""
        ...

    def kept_bytes(self, tokens: int) -> float:
        """Bytes that one image's pass takes until its backward ends, under `remat`."""
        ...
