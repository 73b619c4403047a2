"""What a flow model sees of a prompt, whatever made it: its embedding, its token ids."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

_Arrays = Array | np.ndarray | jax.ShapeDtypeStruct  # of device, host, or planned
PAD, UNKNOWN = 0, 1


@struct.dataclass
class TextEmbedding:
    """What the transformer sees of the prompts: token states and one pooled vector."""

    context: Float[_Arrays, "*lead token feature"]
    pooled: Float[_Arrays, "*lead pooled"]


@runtime_checkable
class Tokenizer(Protocol):
    """Prompts to ids below `size`, `max_length` of them each."""

    @property
    def size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "prompt token"]: ...


@dataclasses.dataclass(frozen=True)
class Cut:
    """The texts of which an encoder does not see the end.

    `tokens`: how many each would have, those of start and end included, of which the
    encoder takes `limit`.
    """

    encoder: str
    limit: int
    tokens: Mapping[str, int]


@runtime_checkable
class PromptEncoders(Protocol):
    """Text encoders that are too large to stay: in memory only while `encoding`."""

    def key(self) -> dict[str, Any]:
        """What determines an embedding, beside the prompt and the `files`."""
        ...

    def files(self) -> list[Path]:
        """Weights and configurations of encoders and tokenizers."""
        ...

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of the parts of an embedding, without the prompt axis."""
        ...

    def encoding(self) -> Callable[[Sequence[str]], TextEmbedding]:
        """Loads the encoders; what it returns embeds prompts and holds them."""
        ...

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """What the encoders do not read of these texts, one of the list an encoder."""
        ...
