"""What a flow model sees of a prompt, whatever made it: its embedding, its token ids."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

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
