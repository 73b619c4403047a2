"""From prompts to their embeddings: the table of a run."""

from collections.abc import Sequence

import ml_collections

from flowgrpo_jax.engine import text_table
from flowgrpo_jax.models.flow_model import FlowModel, Variables


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
