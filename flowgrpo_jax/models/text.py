"""What a flow model sees of a prompt, whatever made it: its embedding, its token ids."""

import dataclasses
from collections.abc import Callable, Sequence
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
class Reader:
    """A text encoder, how many tokens it takes, and its tokenizer of transformers.

    Those of start and end are among the `limit`; what is longer is cut.
    """

    encoder: str
    limit: int
    tokenizer: Any


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

    def readers(self) -> list[Reader]:
        """The encoders and their tokenizers."""
        ...
