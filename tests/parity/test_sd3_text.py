"""Prompt encoding against diffusers' StableDiffusion3Pipeline.encode_prompt.

A small random pipeline (torch, fp32) is the oracle, its tokenizers included.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models import sd3_text
from flowgrpo_jax.models.sd3_text import SD3Text, SD3TextConfig, SD3Tokenizer
from flowgrpo_jax.models.tokenizers import Tokenizer
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import write_pipeline

# Empty, unknown characters, upper case and blanks, and two that are cut: by T5 at 20
# tokens, and by CLIP at 77.
PROMPTS = [
    "",
    "a photo of the red circle",
    '  A sign  that reads "HELLO, zebra 42!" é 漢',
    "the green square of the blue circle and the red sign " * 2,
    "hello " * 100,
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("pipeline")
    return write_pipeline(folder), folder


@pytest.fixture(scope="module")
def short(made):
    """Our embeddings of the prompts with 20 tokens for T5."""
    return encoded(made[1], 20)


def encoded(folder, length: int, dtype=jnp.float32):
    """Context and pooled of the prompts, by way of the folder alone."""
    config = SD3TextConfig.from_folder(folder).with_dtype(dtype)
    params = sd3_text.read(folder, sd3_text.shapes(config))
    ids = jnp.asarray(SD3Tokenizer(folder, length)(PROMPTS))
    return jax.jit(SD3Text(config).apply)({"params": params}, ids)


def expected(pipeline, length: int) -> list[torch.Tensor]:
    """Context, that of the negative prompt, pooled, that of the negative prompt."""
    with torch.no_grad():
        return pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=length)


def assert_same(ours, context, pooled):
    """CLIP's and T5's tokens are compared apart: they differ in size."""
    clip, t5 = slice(sd3_text.CLIP_TOKENS), slice(sd3_text.CLIP_TOKENS, None)
    assert_close(ours.context[:, clip], context[:, clip])
    assert_close(ours.context[:, t5], context[:, t5])
    assert_close(ours.pooled, pooled)


def test_embeddings(made, short):
    """Also of the default negative prompt: the empty one, encoded like any other."""
    context, negative_context, pooled, negative_pooled = expected(made[0], 20)
    assert_same(short, context, pooled)
    empty = jax.tree.map(lambda rows: rows[:1], short)
    assert_same(empty, negative_context[:1], negative_pooled[:1])


def test_embeddings_at_the_default_length(made):
    pipeline, folder = made
    context, _, pooled, _ = expected(pipeline, sd3_text.MAX_SEQUENCE_LENGTH)
    assert_same(encoded(folder, sd3_text.MAX_SEQUENCE_LENGTH), context, pooled)


def test_without_t5(made, tmp_path):
    pipeline, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / part)
    edit(tmp_path / "model_index.json", text_encoder_3=[None, None])
    encoder = pipeline.text_encoder_3
    pipeline.text_encoder_3 = None
    try:
        context, _, pooled, _ = expected(pipeline, 20)
    finally:
        pipeline.text_encoder_3 = encoder
    ours = encoded(tmp_path, 20)
    assert_close(ours.context, context)
    assert_close(ours.pooled, pooled)
    np.testing.assert_array_equal(ours.context[:, sd3_text.CLIP_TOKENS :], 0)


def test_bfloat16_stays_near(made, short):
    """Oracle: our fp32; every part is within a few hundredths of its size."""
    half = encoded(made[1], 20, jnp.bfloat16)
    for name in ("context", "pooled"):
        ours, exact = getattr(half, name), getattr(short, name)
        assert ours.dtype == jnp.bfloat16
        error = np.abs(ours.astype(jnp.float32) - exact).mean()
        assert 0 < error < 0.03 * np.abs(exact).mean()


def test_ids_with_the_files_of_the_hub(made, tmp_path):
    """SD3's CLIP tokenizers come as vocab.json and merges.txt, without tokenizer.json.

    Oracle: the pipeline's tokenizer; CLIP-G pads with "!".
    """
    pipeline, _ = made
    told = json.loads(pipeline.tokenizer_2.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(told["vocab"]))
    merges = [" ".join(pair) for pair in told["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "!", "model_max_length": 77})
    )
    tokenizer = Tokenizer(tmp_path, "clip")
    theirs = pipeline.tokenizer_2(
        PROMPTS, padding="max_length", max_length=77, truncation=True
    )
    np.testing.assert_array_equal(tokenizer(PROMPTS), theirs.input_ids)
    assert (tokenizer([""])[0, 2:] == told["vocab"]["!"]).all()


@pytest.mark.parametrize("length", [0, 513])
def test_length_out_of_range(made, length):
    with pytest.raises(UserError, match=rf"max_sequence_length: {length}: .*1 \.\.\. "):
        SD3Tokenizer(made[1], length)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_no_tokenizer(tmp_path, kind):
    with pytest.raises(UserError, match="no tokenizer: the folder must have token"):
        Tokenizer(tmp_path, kind)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read") as error:
        Tokenizer(tmp_path, "t5")
    assert "\n" not in str(error.value)


def test_folder_without_an_index(made, tmp_path):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(made[1] / name, tmp_path / name)
    with pytest.raises(UserError, match="model_index.json: cannot be read"):
        SD3Tokenizer(tmp_path)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
