"""A text encoder of a few thousand parameters, which learns beside its transformer."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from flowgrpo_jax.models.text import TextEmbedding


class WordEncoder(nn.Module):
    """Word embeddings with position; the pooled vector sees all words in order."""

    vocabulary: int
    width: int
    max_length: int

    @nn.compact
    def __call__(self, ids: Int[Array, "prompt token"]) -> TextEmbedding:
        words = nn.Embed(self.vocabulary, self.width, name="words")(ids)
        place = self.param(
            "place", nn.initializers.normal(0.02), (self.max_length, self.width)
        )
        context = words + place
        hidden = nn.Dense(2 * self.width, name="pool_1")(
            context.reshape(ids.shape[0], -1)
        )
        pooled = nn.Dense(self.width, name="pool_2")(nn.gelu(hidden))
        return TextEmbedding(context=context, pooled=jnp.asarray(pooled))
