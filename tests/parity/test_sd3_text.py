"""Prompt encoding against diffusers' StableDiffusion3Pipeline.encode_prompt.

A small random pipeline (torch, fp32) is the oracle, its tokenizers included.
"""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tokenizers
from flowgrpo_jax.models.files.tokenizers import Tokenizer
from flowgrpo_jax.models.sd3 import text as sd3_text
from flowgrpo_jax.models.sd3.prompts import SD3PromptEncoders
from flowgrpo_jax.models.sd3.text import SD3Text, SD3TextConfig, sd3_tokenizer
from tests.parity.oracle import assert_close
from tests.parity.tiny_sd3 import write_pipeline

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
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
    ids = jnp.asarray(sd3_tokenizer(folder, length)(PROMPTS))
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


def test_what_is_cut_is_known(made):
    """Oracle: lengths that the pipeline's own tokenizers give without cutting."""
    pipeline, folder = made
    exact = " ".join(["red"] * 75)  # 77 with start and end
    # Of letters that no word knows, around the lengths that are not looked at.
    letters, rng = list("QZ?# 7"), np.random.default_rng(0)
    odd = [
        "".join(rng.choice(letters, size))
        for size in (*range(14, 24), *range(70, 80))
        for _ in range(20)
    ]
    texts = list(dict.fromkeys([*PROMPTS, exact, exact + " red", *odd]))
    readers = {one.encoder: one for one in sd3_tokenizer(folder, 20).readers()}
    for name, tokenizer, most in (
        ("CLIP-L", pipeline.tokenizer, 77),
        ("CLIP-G", pipeline.tokenizer_2, 77),
        ("T5", pipeline.tokenizer_3, 20),
    ):
        ours = readers[name]
        assert ours.limit == most
        tokens = {text: len(tokenizer(text).input_ids) for text in texts}
        found = tokenizers.longer(ours.tokenizer, texts, most)
        assert found == {text: n for text, n in tokens.items() if n > most}
        assert tokenizers.longer(ours.tokenizer, ["red", ""], most) == {}
    clip = [readers[name].tokenizer for name in ("CLIP-L", "CLIP-G")]
    found = tokenizers.longer(clip[0], texts, 77)
    assert found[exact + " red"] == 78 and exact not in found


def test_tokenizers_of_the_same_tokens(made, tmp_path):
    """Oracle: an invariance; how they cut and pad does not tell them apart."""
    folder = made[1]
    one, other = (Tokenizer(folder / "tokenizer", "clip", n) for n in (77, 5))
    one(["red"])
    other(["red " * 9])
    large = Tokenizer(folder / "tokenizer_3", "t5")
    names = [tokenizers.identity(t.reader("x").tokenizer) for t in (one, other, large)]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("length", [0, 513])
def test_length_out_of_range(made, length):
    with pytest.raises(UserError, match=rf"max_sequence_length: {length}: .*1 \.\.\. "):
        sd3_tokenizer(made[1], length)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_no_tokenizer(tmp_path, kind):
    with pytest.raises(UserError, match="no tokenizer: the folder must have token"):
        Tokenizer(tmp_path, kind)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: is not JSON") as error:
        Tokenizer(tmp_path, "t5")
    assert "\n" not in str(error.value)


@pytest.fixture
def copy(made, tmp_path):
    """The pipeline's folder, to be spoilt."""
    return shutil.copytree(made[1], tmp_path / "copy")


@pytest.mark.parametrize(
    "file, values, message",
    [
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 64},
            "_max_length: 64",
        ),
        (
            "text_encoder/config.json",
            {"max_position_embeddings": 64},
            "max_position_emb",
        ),
        ("text_encoder_2/config.json", {"projection_dim": None}, "projection_dim"),
        (
            "text_encoder_2/config.json",
            {"vocab_size": 100},
            "tokenizer_2: .* knows 100",
        ),
        ("text_encoder_3/config.json", {"vocab_size": 99}, "tokenizer_3: .* knows 99"),
        ("transformer/config.json", {"joint_attention_dim": 50}, "encoders give 48"),
        ("transformer/config.json", {"pooled_projection_dim": 50}, "CLIPs give 40"),
        ("text_encoder/config.json", {"num_attention_heads": 3}, "hidden_size: 16"),
        (
            "text_encoder/config.json",
            {"use_attention_mask": True},
            "use_attention_mask",
        ),
        ("text_encoder/config.json", {"hidden_act": "gelu_new"}, "hidden_act"),
    ],
)
def test_what_does_not_fit_is_named(copy, file, values, message):
    """Oracle: the line, by hand: the file or folder, and the key."""
    edit(copy / file, **values)
    encoders = SD3PromptEncoders(str(copy), 20, "float32")
    with pytest.raises(UserError, match=f"model: {copy}.*{message}") as caught:
        encoders.encoding()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("tokenizer/tokenizer.json", "{", "is not JSON"),
        ("tokenizer_2/tokenizer_config.json", '{"a": 1', "is not JSON"),
        ("tokenizer_3/special_tokens_map.json", "[]", "holds no JSON object"),
        ("tokenizer/merges.txt", f"{LFS}", "is a git LFS pointer"),
        ("tokenizer_3/tokenizer.json", f"{LFS}", "is a git LFS pointer"),
        ("text_encoder_3/config.json", f"{LFS}", "is a git LFS pointer"),
    ],
)
def test_damaged_files_are_named(copy, file, text, message):
    """Oracle: the line, by hand; it has the file, not only the folder."""
    (copy / file).write_text(text)
    with pytest.raises(UserError, match=f"model: {copy / file}: {message}") as caught:
        SD3PromptEncoders(str(copy), 20, "float32").encoding()
    assert "\n" not in str(caught.value)


def test_pieces_alone_need_sentencepiece(copy):
    """Oracle: the line that tells what to install; transformers' own names tiktoken."""
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    (copy / "tokenizer_3" / "tokenizer.json").rename(copy / "tokenizer_3/spiece.model")
    with pytest.raises(UserError, match="spiece.model: .*pip install sentencepiece"):
        sd3_tokenizer(copy, 20)


def test_the_class_is_that_of_the_index(copy, made):
    """Oracle: diffusers, which reads by model_index.json whatever `architectures` says."""
    edit(copy / "text_encoder" / "config.json", architectures=["CLIPModel"])
    config = SD3TextConfig.from_folder(copy)
    assert config == SD3TextConfig.from_folder(made[1])


def test_folder_without_an_index(made, tmp_path):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(made[1] / name, tmp_path / name)
    with pytest.raises(UserError, match="model_index.json: cannot be read"):
        sd3_tokenizer(tmp_path)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
