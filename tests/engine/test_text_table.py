"""Embeddings of prompts are made when the coming iterations need them, and once."""

import types

import jax
import numpy as np
import pytest

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import specs
from flowgrpo_jax.cost import budget
from flowgrpo_jax.data import prompts as prompt_data
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import text_table
from flowgrpo_jax.models.sd3.prompts import SD3PromptEncoders
from flowgrpo_jax.models.text import TextEmbedding
from flowgrpo_jax.runtime.resolution import Size
from tests.tiny import tiny_model

SIZE = Size(64, 64)


class Encoders(SD3PromptEncoders):
    """Encoders whose embedding of a prompt is its length; they count their loads."""

    loads = 0
    encoded: list[str] = []

    def files(self):
        return []

    def shapes(self):
        like = {"context": (2, 3), "pooled": (4,)}
        return {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in like.items()}

    def encoding(self):
        type(self).loads += 1

        def encode(texts):
            self.encoded.extend(text for text in texts if text)
            sizes = np.float32([len(text) for text in texts])
            return TextEmbedding(
                np.tile(sizes[:, None, None], (1, 2, 3)), np.tile(sizes[:, None], 4)
            )

        return encode


@pytest.fixture
def encoders():
    Encoders.loads, Encoders.encoded = 0, []
    return Encoders("nowhere", 16, "float32")


def test_only_what_is_asked_for_is_encoded_and_once(encoders, tmp_path, capsys):
    """Oracle: counting; the rows are the lengths of the prompts."""
    held_out = ["a", "bb"]
    table = text_table.CachedTable(encoders, str(tmp_path), held_out)
    assert (Encoders.loads, Encoders.encoded) == (1, held_out)
    assert "encoding 3 prompts into" in capsys.readouterr().out
    assert not table.lacks(held_out) and table.lacks(["a", "ccc"])
    with jax.transfer_guard("disallow"):  # as in the loop
        table.add(["ccc", "a", "dddd", "ccc"])
    assert (Encoders.loads, Encoders.encoded) == (2, ["a", "bb", "ccc", "dddd"])
    table.add(["dddd", "a"])
    again = text_table.CachedTable(encoders, str(tmp_path), ["ccc"])
    assert Encoders.loads == 2
    rows = again.rows(["dddd", "a", "ccc"])
    np.testing.assert_array_equal(rows.pooled[:, 0], [4, 1, 3])


def test_encoding_can_be_interrupted_and_goes_on(encoders, tmp_path):
    """Oracle: counting; nothing that was made is made again."""
    texts = [f"{number:02d}" for number in range(20)]
    table = text_table.CachedTable(encoders, str(tmp_path), [])
    calls = []

    def check():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.add(texts, check)
    assert Encoders.encoded == texts[:16]
    table.add(texts, check)
    assert Encoders.encoded == texts


def test_time_to_go_is_told(encoders, tmp_path, capsys, monkeypatch):
    """Oracle: by hand; 8 of 24 prompts a minute, told every half."""
    table = text_table.CachedTable(encoders, str(tmp_path), [])
    clock = iter([0.0, 60.0, 120.0, 180.0])
    # Not the clock of the process, which threads of other tests read, too.
    own = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(text_table, "time", own)
    capsys.readouterr()
    table.add([f"{number:02d}" for number in range(24)])
    told = capsys.readouterr().out.splitlines()[1:]
    assert told == ["encoded 8 of 24, 2 min to go", "encoded 16 of 24, 1 min to go"]


def test_a_table_in_memory_grows_too():
    """Oracle: an invariance; the table that was made for all of them at once."""
    model, variables = tiny_model()
    texts = [f"a photo of {n} red circles" for n in ("two", "three", "four")]
    whole = text_table.WordTable(model, variables, texts, batch=2)
    grown = text_table.WordTable(model, variables, texts[:1], batch=2)
    assert grown.lacks(texts) and not grown.lacks(texts[:1])
    grown.add(texts)
    assert not grown.lacks(texts)
    for one, other in zip(
        jax.tree.leaves(grown.rows(texts)),
        jax.tree.leaves(whole.rows(texts)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("last", [3, 40, 1000])
def test_what_the_coming_iterations_need(last):
    """Oracle: the prompts of every iteration, one by one; no more than a block."""
    prompts = [Prompt(f"prompt {number}") for number in range(9000)]
    size, needed = 48, {}
    for iteration in range(0, min(last, 100)):
        drawn = prompt_data.batch(prompts, 7, iteration, size)
        needed[iteration] = {prompt.text for prompt in drawn}
    for start in (0, 2, 37):
        texts = text_table.coming({SIZE: prompts}, 7, start, size, last)
        stop = min(last, start + 43)  # 43 iterations of 48 are 2,064 prompts
        assert set(texts) == set().union(*(needed[i] for i in range(start, stop)))
        assert len(texts) <= text_table.BLOCK + size


def test_an_iteration_of_more_than_a_block():
    """Oracle: by hand; at least one iteration, whatever its size."""
    prompts = [Prompt(f"prompt {number}") for number in range(3000)]
    assert len(text_table.coming({SIZE: prompts}, 0, 5, 3000, 9)) == 3000
    assert text_table.coming({SIZE: prompts}, 0, 9, 3000, 9) == []


def test_the_plan_tells_what_the_prompts_take():
    """Oracle: by hand; 205 tokens of 4,096 and 2,048 pooled in bf16, by prompt."""
    config = configs.make("model=sd3.5-medium", num_iterations=20)
    model, _ = assemble.abstract_model(config)
    prompts = [Prompt(f"prompt {number}") for number in range(50_000)]
    held_out = [Prompt("a"), Prompt("b"), Prompt("a")]

    def line_of(config):
        spec, folder = specs.policy_spec(config), config.embedding_cache
        return budget.text_line(spec, model, prompts, held_out, folder)

    line = line_of(config)
    size = 2 * (205 * 4096 + 2048)
    assert line.startswith(
        f"at most 963 prompts to encode, {size / 1e6:.2f} MB each, "
        f"{963 * size / 1e9:.2f} GB in {config.embedding_cache}; "
    )
    config.num_iterations = 10_000
    line = line_of(config)
    assert line.startswith("at most 50,003 prompts to encode, 1.68 MB each, 84.1")
