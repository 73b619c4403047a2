"""Adapters in the files of diffusers and PEFT; those read them in tests/parity."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import lora_files, lora_reading
from flowgrpo_jax.models.files.lora_names import LayerNames
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig

RANK, WIDTH, ALPHA = 2, 8, 5.0
CONFIG = MMDiTConfig(num_layers=3, attention_head_dim=4, num_attention_heads=2)
TABLE = transformer_config.table(CONFIG)
LAYERS = [f"transformer_blocks.{n}.attn.to_{part}" for n in "01" for part in "qkv"]
LAYERS.append("transformer_blocks.2.attn.to_out.0")
NAMES = LayerNames(dict.fromkeys(LAYERS, (WIDTH, WIDTH)))


def lora():
    """Two scanned blocks with a fused projection, and the last block's output."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    fused = {"a": normal(2, 3, WIDTH, RANK), "b": normal(2, 3, RANK, WIDTH)}
    one = {"a": normal(1, WIDTH, RANK), "b": normal(1, RANK, WIDTH)}
    return {
        "blocks": {"block": {"attn": {"qkv": fused}}},
        "last_block": {"attn": {"to_out": one}},
    }


def test_names_and_layout():
    """Oracle: the layout of PEFT, by hand: A [rank, in], B [out, rank] per module."""
    tree = lora()
    adapter = lora_files.from_variables(tree, TABLE, ALPHA)
    assert adapter.rank == RANK
    assert adapter.modules == sorted(LAYERS)
    fused = tree["blocks"]["block"]["attn"]["qkv"]
    held = adapter.weights["transformer_blocks.1.attn.to_k.lora_A.weight"]
    np.testing.assert_array_equal(held, fused["a"][1, 1].T)
    held = adapter.weights["transformer_blocks.0.attn.to_v.lora_B.weight"]
    np.testing.assert_array_equal(held, fused["b"][0, 2].T)


def fresh(tree=None, rank=RANK):
    """The tree of a run that begins with nothing: some A, and B of zeros."""
    rng = np.random.default_rng(1)
    tree = tree or lora()

    def grown(path, leaf):
        *rest, rows, columns = leaf.shape
        shape = (*rest, rows, rank) if path[-1].key == "a" else (*rest, rank, columns)
        drawn = rng.standard_normal(shape).astype(np.float32)
        return drawn if path[-1].key == "a" else np.zeros(shape, np.float32)

    return jax.tree_util.tree_map_with_path(grown, tree)


def changes(tree, alpha):
    """By hand: A B alpha / rank of every layer, without regard to the rank."""
    flat = traverse_util.flatten_dict(tree)
    return {
        path[:-1]: flat[path] @ flat[(*path[:-1], "b")] * alpha / flat[path].shape[-1]
        for path in flat
        if path[-1] == "a"
    }


def assert_same_change(found, wanted):
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        np.testing.assert_allclose(found[path], change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout, alpha", [("diffusers", 8.0), ("peft", ALPHA)])
def test_there_and_back(tmp_path, capsys, layout, alpha):
    """Oracle: an invariance; bit for bit where alpha / rank is a power of two."""
    tree = lora()
    adapter = lora_files.from_variables(tree, TABLE, alpha)
    if layout == "diffusers":
        lora_files.write_diffusers(tmp_path, adapter)
    else:
        lora_files.write_peft(tmp_path, adapter, "a/b")
    found = lora_reading.read(tmp_path, NAMES)
    assert found.keys() == set(LAYERS)
    back = lora_files.to_variables(found, fresh(tree), TABLE, alpha)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert not capsys.readouterr().out


def test_any_alpha_and_any_room(tmp_path):
    """Oracle: by hand; the same change under another alpha, at a larger rank."""
    tree = lora()
    adapter = lora_files.from_variables(tree, TABLE, ALPHA)
    lora_files.write_diffusers(tmp_path, adapter)
    found = lora_reading.read(tmp_path, NAMES)
    for alpha, rank in [(ALPHA, RANK), (3.0, RANK), (3.0, 7)]:
        started = fresh(tree, rank)
        back = lora_files.to_variables(found, started, TABLE, alpha)
        assert_same_change(changes(back, alpha), changes(tree, ALPHA))
    # What is left over can learn: its A are those of a run that begins with nothing.
    a, began = (x["last_block"]["attn"]["to_out"]["a"] for x in (back, started))
    np.testing.assert_array_equal(a[..., RANK:], began[..., RANK:])
    assert (np.abs(a[..., RANK:]) > 0).all()


def test_a_layer_that_is_not_in_it_begins_as_ever(capsys):
    """Oracle: by hand; a layer of the run that the adapter lacks changes nothing."""
    tree = lora()
    adapter = lora_files.from_variables(tree, TABLE, ALPHA)
    factors = as_layers(adapter)
    part = {name: factors[name] for name in LAYERS[1:]}
    started = fresh(tree)
    back = lora_files.to_variables(part, started, TABLE, ALPHA)
    wanted = changes(tree, ALPHA)
    wanted[("blocks", "block", "attn", "qkv")][0, 0] = 0
    assert_same_change(changes(back, ALPHA), wanted)
    fused = ("blocks", "block", "attn", "qkv")
    left, began = (
        traverse_util.flatten_dict(x)[(*fused, "a")] for x in (back, started)
    )
    np.testing.assert_array_equal(left[0, 0], began[0, 0])
    assert "1 of the 7 layers that train.lora_targets names" in capsys.readouterr().out


def as_layers(adapter):
    return {
        module: lora_files.Factors(
            adapter.weights[f"{module}.lora_A.weight"],
            adapter.weights[f"{module}.lora_B.weight"],
            adapter.alpha / adapter.rank,
        )
        for module in adapter.modules
    }


def test_all_readers_find_the_strength(tmp_path):
    """Oracle: the keys that diffusers 0.42 reads; without them alpha is the rank."""
    adapter = lora_files.from_variables(lora(), TABLE, ALPHA)
    path = lora_files.write_diffusers(tmp_path, adapter)
    with safe_open(path, framework="np") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    assert told["transformer.r"] == RANK and told["transformer.lora_alpha"] == RANK
    assert told["transformer.target_modules"] == adapter.modules
    assert all(name.startswith("transformer.") for name in weights)
    for module, layer in as_layers(adapter).items():
        a, b = (weights[f"transformer.{module}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(b @ a, layer.strength * layer.b @ layer.a, rtol=1e-5)
    save_file(weights, path, {"format": "pt"})
    assert {layer.strength for layer in lora_reading.read(path, NAMES).values()} == {1}


def test_who_may_read_a_file_may_read_these(tmp_path):
    """Oracle: the mode of a file that Python opens."""
    adapter = lora_files.from_variables(lora(), TABLE, ALPHA)
    path = lora_files.write_diffusers(tmp_path, adapter)
    folder = lora_files.write_peft(tmp_path / "peft", adapter, "base")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert path.stat().st_mode == wanted
    assert (folder / lora_files.PEFT_FILE).stat().st_mode == wanted


def test_what_does_not_fit_is_named(tmp_path):
    """Oracle: the lines, by hand."""
    tree = lora()
    layers = as_layers(lora_files.from_variables(tree, TABLE, ALPHA))
    fewer = {"last_block": fresh(tree)["last_block"]}
    line = r"0\.attn\.to_k: a module that is not adapted here: .*name attn.to_k, .*to_v too"
    with pytest.raises(UserError, match=f"^train.lora_path: .*{line}"):
        lora_files.to_variables(layers, fewer, TABLE, ALPHA)
    with pytest.raises(UserError, match="train.lora_rank: 1: .* has rank 2: set it"):
        lora_files.to_variables(layers, fresh(tree, 1), TABLE, ALPHA)
    with pytest.raises(UserError, match="train.lora_path: .* cannot be read"):
        lora_reading.read(tmp_path / "gone", NAMES)
