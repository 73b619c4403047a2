"""fp8 weights with their scales against torch's products; other kinds are one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.files.tensors import Part, Rule

ROWS, COLUMNS = 6, 5
TABLE = (Rule("(first|second)/kernel", r"\1.weight", "dense"),)
HALVES = {
    "first.weight": Part("a.both.weight", (0, ROWS // 2, ROWS)),
    "second.weight": Part("a.both.weight", (ROWS // 2, ROWS, ROWS)),
}
MARK = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def weight(dtype=torch.float8_e4m3fn):
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return (100 * values).to(dtype)


def marked(**mark):
    text = json.dumps(MARK | mark).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read(path, dtype=jnp.float32):
    half = jax.ShapeDtypeStruct((COLUMNS, ROWS // 2), dtype)
    like = {"first": {"kernel": half}, "second": {"kernel": half}}
    tree = tensors.read(path, TABLE, like, (), HALVES)
    return np.concatenate([tree["first"]["kernel"], tree["second"]["kernel"]], axis=1).T


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", None])
@pytest.mark.parametrize("shape", [(), (1,), (ROWS,), (ROWS, 1)])
def test_products(tmp_path, stored, name, shape):
    """Oracle: torch's product in fp32; rows of the tensor keep their own scales."""
    path, given = tmp_path / "w.safetensors", weight(stored)
    scale = 0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(1))
    beside = {f"a.both.{name}": scale, "a.both.input_scale": torch.ones(())}
    beside |= {
        "a.both.comfy_quant": marked(),
        "scaled_fp8": torch.empty(0, dtype=stored),
    }
    save_file({"a.both.weight": given} | (beside if name else {}), path)
    wanted = given.float()
    if name:
        wanted = wanted * scale.reshape(-1, 1)
    np.testing.assert_array_equal(read(path), wanted.numpy())
    rounded = wanted.to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(read(path, jnp.bfloat16).astype(np.float32), rounded)


@pytest.mark.parametrize(
    "beside, line",
    [
        (
            {"weight_scale": torch.ones(ROWS, 2)},
            "both.weight_scale: float32\\[6, 2\\]: only",
        ),
        (
            {"weight_scale": torch.ones(1, ROWS)},
            "both.weight_scale: float32\\[1, 6\\]: only",
        ),
        (
            {"weight_scale": torch.ones((), dtype=torch.uint8)},
            "both.weight_scale: uint8\\[\\]: only one scale",
        ),
        (
            {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
            "both.\\w+: a second scale of a.both.weight",
        ),
        ({"weight_scale_2": torch.ones(())}, "both.weight_scale_2: nothing in the net"),
        (
            {"comfy_quant": marked(format="mxfp8")},
            'both.comfy_quant: format "mxfp8": only',
        ),
        (
            {"comfy_quant": marked(convrot=True)},
            "both.comfy_quant: convrot: true: not fo",
        ),
        (
            {"weight": weight(torch.int8)},
            "both.weight: whole numbers \\(int8\\) in place",
        ),
        (
            {
                "weight": torch.zeros(15, 1, dtype=torch.uint8),
                "weight.absmax": torch.ones(1),
            },
            "both.weight: quantised by bitsandbytes.*AutoModel.*dequantize",
        ),
        (
            {"weight": weight(torch.int8), "SCB": torch.ones(ROWS)},
            "both.weight: quantised by bitsandbytes.*AutoModel.*dequantize",
        ),
        (
            {"weight": torch.full((ROWS, COLUMNS), torch.nan).to(torch.float8_e4m3fn)},
            "both.weight: holds values that are not finite",
        ),
        (
            {"weight": weight(torch.bfloat16), "weight_scale": torch.ones(())},
            "both.weight_scale: nothing in the network takes it",
        ),
    ],
)
def test_what_is_quantised_otherwise_is_named(tmp_path, beside, line):
    """Oracle: the contract; right, or one line that names the tensor."""
    path = tmp_path / "w.safetensors"
    held = {"weight": weight()} | beside
    save_file({f"a.both.{name}": held[name] for name in held}, path)
    with pytest.raises(UserError, match=f"^weights: {path}: tensor a.{line}"):
        read(path)


@pytest.mark.parametrize(
    "layers, line",
    [
        ({"both": {"format": "nvfp4"}}, 'both: format "nvfp4": only'),
        ({"a.both": MARK | {"group": 3}}, "a.both: group: 3: not followed"),
        ([], "layers: must be an object"),
        ({"another": {"format": "nvfp4"}, "a.both": MARK}, None),
    ],
)
def test_marks_in_the_header(tmp_path, layers, line):
    """Oracle: as above; those of layers that are not read do not matter."""
    path, told = tmp_path / "w.safetensors", json.dumps({"layers": layers})
    save_file({"a.both.weight": weight()}, path, {"_quantization_metadata": told})
    if line is None:
        np.testing.assert_array_equal(read(path), weight().float().numpy())
        return
    with pytest.raises(UserError, match=f"_quantization_metadata: {line}"):
        read(path)


def test_swapped_halves(tmp_path):
    """Oracle: torch's chunks of the product; scales stay with their rows."""
    path, scale = tmp_path / "w.safetensors", torch.arange(1.0, ROWS + 1)[:, None]
    save_file({"w.weight": weight(), "w.weight_scale": scale}, path)
    like = {"first": {"kernel": jax.ShapeDtypeStruct((COLUMNS, ROWS), jnp.float32)}}
    parts = {"first.weight": Part("w.weight", swapped=True)}
    found = tensors.read(path, TABLE, like, (), parts)["first"]["kernel"]
    wanted = torch.cat((weight().float() * scale).chunk(2)[::-1])
    np.testing.assert_array_equal(found, wanted.T.numpy())


def test_parts_of_what_is_not_there_are_named(tmp_path):
    """Oracle: the contract."""
    path = tmp_path / "w.safetensors"
    save_file({"a.both.weight": torch.ones(ROWS + 1, COLUMNS)}, path)
    with pytest.raises(UserError, match=r"a.both.weight: shape \[7, 5\]: .* \[6, 5\]"):
        read(path)
    save_file({"a.other.weight": torch.ones(ROWS, COLUMNS)}, path)
    with pytest.raises(UserError, match=r"tensor a.both.weight: missing"):
        read(path)
