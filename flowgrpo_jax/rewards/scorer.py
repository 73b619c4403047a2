"""A reward that is a network in JAX: fixed shapes, one program, and its gradient."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.text import Reader
from flowgrpo_jax.rewards.detection import Images


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores images in microbatches of one shape; the last one is padded.

    `score` is pure and differentiable in the images: (params, images in [0, 1],
    conditions) -> scores. `conditions` computes its third argument from the prompts: a
    tree of arrays with a row for each prompt, such as tokens. `check_prompt` raises
    ValueError for a prompt from which that cannot be computed. `reader` is the encoder
    of the prompts' texts, if the network reads them.
    """

    name: str
    params: Any
    score: Callable[[Any, Array, Any], Array]
    conditions: Callable[[Sequence[Prompt]], Any]
    microbatch: int = 16
    check_prompt: Callable[[Prompt], None] | None = None
    reader: Reader | None = None

    def __post_init__(self):
        if self.microbatch < 1:
            raise UserError(
                f"reward_options.{self.name}.microbatch: {self.microbatch}: must be "
                "at least 1"
            )

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, Float[np.ndarray, " image"]]:
        conditions = self.conditions(prompts)
        scores = []
        for start in range(0, len(images), self.microbatch):
            rows = slice(start, start + self.microbatch)
            # The last row again fills the batch: zeros could give NaN.
            batch, wanted = jax.tree.map(
                lambda x, rows=rows: _fill(x[rows], self.microbatch),
                (jnp.asarray(images), conditions),
            )
            scores.append(self._program(self.params, batch, wanted))
        joined = np.concatenate([np.asarray(part) for part in scores] or [np.zeros(0)])
        return {self.name: joined[: len(images)].astype(np.float32)}

    def differentiable(
        self, prompts: Sequence[Prompt]
    ) -> Callable[[Float[Array, "image height width 3"]], Float[Array, " image"]]:
        """A differentiable function images -> scores, for one image of each prompt."""
        conditions = jax.tree.map(jnp.asarray, self.conditions(prompts))
        return lambda images: self.score(self.params, images, conditions)

    @functools.cached_property
    def _program(self):
        return jax.jit(self.score)


def _fill(rows: Array | np.ndarray, size: int) -> Array:
    """Repeats the last row until there are `size` rows."""
    rows = jnp.asarray(rows)
    spare = size - len(rows)
    return jnp.concatenate([rows, jnp.repeat(rows[-1:], spare, axis=0)])
