"""Adapters in the files of diffusers and PEFT; those read them in tests/parity."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import lora_files, lora_reading
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.sd3.transformer_config import MMDiTConfig

RANK, WIDTH, ALPHA = 2, 8, 5.0
CONFIG = MMDiTConfig(num_layers=3, attention_head_dim=4, num_attention_heads=2)
TABLE = transformer_config.table(CONFIG)


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
    assert adapter.modules == sorted(
        f"transformer_blocks.{layer}.attn.to_{part}" for layer in "01" for part in "qkv"
    ) + ["transformer_blocks.2.attn.to_out.0"]
    fused = tree["blocks"]["block"]["attn"]["qkv"]
    held = adapter.weights["transformer_blocks.1.attn.to_k.lora_A.weight"]
    np.testing.assert_array_equal(held, fused["a"][1, 1].T)
    held = adapter.weights["transformer_blocks.0.attn.to_v.lora_B.weight"]
    np.testing.assert_array_equal(held, fused["b"][0, 2].T)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_there_and_back(tmp_path, layout):
    """Oracle: an invariance; bit for bit, alpha included; the folded one is as strong."""
    tree = lora()
    adapter = lora_files.from_variables(tree, TABLE, ALPHA)
    if layout == "diffusers":
        lora_files.write_diffusers(tmp_path, adapter)
    else:
        lora_files.write_peft(tmp_path, adapter, "a/b")
    found = lora_reading.read(tmp_path)
    assert found.alpha == ALPHA and found.weights.keys() == adapter.weights.keys()
    back = lora_files.to_variables(found, tree, TABLE, ALPHA)
    np.testing.assert_array_equal(
        back["last_block"]["attn"]["to_out"]["b"],
        tree["last_block"]["attn"]["to_out"]["b"],
    )
    np.testing.assert_array_equal(
        back["blocks"]["block"]["attn"]["qkv"]["a"],
        tree["blocks"]["block"]["attn"]["qkv"]["a"],
    )
    folded = adapter.folded()
    assert folded.alpha == RANK
    again = lora_files.to_variables(folded, tree, TABLE, ALPHA)
    np.testing.assert_allclose(
        again["last_block"]["attn"]["to_out"]["b"],
        tree["last_block"]["attn"]["to_out"]["b"],
        rtol=1e-6,
    )


def test_alpha_stands_in_the_header(tmp_path):
    """Oracle: the keys that diffusers 0.42 reads; without them alpha is the rank."""
    adapter = lora_files.from_variables(lora(), TABLE, ALPHA)
    path = lora_files.write_diffusers(tmp_path, adapter)
    with safe_open(path, framework="np") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    assert told["transformer.r"] == RANK and told["transformer.lora_alpha"] == ALPHA
    assert told["transformer.target_modules"] == adapter.modules
    assert all(name.startswith("transformer.") for name in weights)
    save_file(weights, path, {"format": "pt"})
    assert lora_reading.read(path).alpha == RANK


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
    adapter = lora_files.from_variables(tree, TABLE, ALPHA)
    fewer = {"last_block": tree["last_block"]}
    with pytest.raises(UserError, match="a module that is not adapted here"):
        lora_files.to_variables(adapter, fewer, TABLE, ALPHA)
    part = lora_files.from_variables(fewer, TABLE, ALPHA)
    with pytest.raises(UserError, match=r"transformer_blocks\.0.*lora_A.* missing"):
        lora_files.to_variables(part, tree, TABLE, ALPHA)
    wide = {"last_block": {"attn": {"to_out": {}}}}
    wide["last_block"]["attn"]["to_out"] = {
        "a": np.zeros((1, WIDTH, 3)),
        "b": np.zeros((1, 3, WIDTH)),
    }
    with pytest.raises(UserError, match="train.lora_rank: 3: .* has rank 2"):
        lora_files.to_variables(part, wide, TABLE, ALPHA)
    with pytest.raises(UserError, match="train.lora_path: .* cannot be read"):
        lora_reading.read(tmp_path / "gone")
    lora_files.write_peft(tmp_path, adapter, "a/b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"use_rslora": True})
    )
    with pytest.raises(UserError, match="use_rslora: true: only false"):
        lora_reading.read(tmp_path)
