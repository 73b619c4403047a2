"""Words to ids to embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax.models.encoders.word import WordEncoder
from flowgrpo_jax.models.text import PAD, UNKNOWN
from flowgrpo_jax.worlds.text import WordTokenizer

TOKENIZER = WordTokenizer(("red", "circle", "and", "square"), max_length=4)
RED, CIRCLE, AND, SQUARE = 2, 3, 4, 5


def test_ids():
    """Oracle: by hand; case, punctuation and stop words do not count, 0 pads."""
    ids = TOKENIZER(["a photo of a red circle", "Red, circle!", "the circle", ""])
    np.testing.assert_array_equal(
        ids,
        [[RED, CIRCLE, PAD, PAD]] * 2 + [[CIRCLE, PAD, PAD, PAD], [PAD] * 4],
    )
    assert ids.dtype == np.int32
    assert TOKENIZER.size == 6


def test_unknown_words_keep_their_place():
    """Oracle: by hand."""
    np.testing.assert_array_equal(
        TOKENIZER(["green circle"]), [[UNKNOWN, CIRCLE, PAD, PAD]]
    )


def test_long_prompts_are_cut():
    """Oracle: by hand; stop words are dropped before the cut."""
    np.testing.assert_array_equal(
        TOKENIZER(["a photo of a red circle and a square and a red square"]),
        [[RED, CIRCLE, AND, SQUARE]],
    )


def encoded(prompts):
    encoder = WordEncoder(TOKENIZER.size, width=8, max_length=4)
    ids = jnp.asarray(TOKENIZER(prompts))
    variables = encoder.init(jax.random.key(0), ids)
    return jax.jit(encoder.apply)(variables, ids)


def test_encoder_sees_word_order():
    """Oracle: construction; the same words in another order are another prompt."""
    text = encoded(["red circle and square", "red square and circle"])
    assert text.context.shape == (2, 4, 8) and text.pooled.shape == (2, 8)
    assert np.abs(text.pooled[0] - text.pooled[1]).max() > 1e-2
    assert np.abs(text.context[0, 1] - text.context[1, 1]).max() > 1e-2
    np.testing.assert_array_equal(text.context[0, 0], text.context[1, 0])


def test_prompts_do_not_see_each_other():
    """Oracle: an invariance; one prompt alone has the embedding it has in a batch."""
    both, alone = encoded(["red circle", "square"]), encoded(["red circle"])
    np.testing.assert_allclose(both.pooled[:1], alone.pooled, atol=1e-6)
    np.testing.assert_array_equal(both.context[:1], alone.context)
