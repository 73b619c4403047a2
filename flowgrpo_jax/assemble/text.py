"""From prompts to their embeddings: the table of a run, and shapes for plans."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from flowgrpo_jax.assemble import text_table
from flowgrpo_jax.models.flow_model import FlowModel, Variables
from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.text import TextEmbedding


def make_text_table(
    config: ml_collections.ConfigDict,
    model: FlowModel,
    variables: Variables,
    texts: Sequence[str],
) -> text_table.TextTable:
    """Embeddings of these prompts and of the negative one."""
    return text_table.make(
        model, variables, texts, config.embedding_cache, config.negative_prompt
    )


def text_shape(config: ml_collections.ConfigDict, model: FlowModel) -> TextEmbedding:
    """Shapes [1, ...] of one prompt's embedding."""
    network, dtype = model.config, jnp.dtype(config.dtype)
    if model.tokenizer is not None:
        tokens, dtype = model.tokenizer.max_length, jnp.dtype(jnp.float32)
    else:
        tokens = sd3_text.CLIP_TOKENS + config.max_sequence_length
    return TextEmbedding(
        jax.ShapeDtypeStruct((1, tokens, network.joint_attention_dim), dtype),
        jax.ShapeDtypeStruct((1, network.pooled_projection_dim), dtype),
    )
