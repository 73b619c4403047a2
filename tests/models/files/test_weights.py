"""Weights files: what goes in comes out, and damage is named."""

import json
import resource
import struct

import numpy as np
import pytest
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import weights


def tree():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3, 5)).astype(np.float32)
    return {
        "transformer": {"block": {"kernel": matrix, "turned": matrix.T}},
        "text": {"scale": np.float32(0.5).reshape(())},
    }


def compare(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in ("kernel", "turned"):
        leaf = found["transformer"]["block"][name]
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(
            leaf, expected["transformer"]["block"][name], **tolerance
        )
    np.testing.assert_array_equal(found["text"]["scale"], expected["text"]["scale"])


def test_round_trip(tmp_path):
    """Oracle: an invariance; fp32 and metadata come back as they were."""
    path, metadata = tmp_path / "w.safetensors", {"width": 96, "name": "é"}
    weights.save(path, tree(), metadata, np.float32)
    found, header = weights.load(path)
    compare(found, tree(), rtol=0)
    assert header == metadata


def test_half_precision(tmp_path):
    """Closed form: fp16 keeps 11 bits, and loads as fp32."""
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    big = {"kernel": np.linspace(-1, 1, 4096, dtype=np.float32)}
    weights.save(whole, big, {}, np.float32)
    weights.save(half, big, {})
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    weights.save(half, tree(), {})
    compare(weights.load(half)[0], tree(), rtol=2**-11)


def test_missing(tmp_path):
    """Oracle: the contract; one line with the path."""
    with pytest.raises(UserError, match=r"weights: .*nothing\.safetensors: no such"):
        weights.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 60, -7])
def test_truncated(tmp_path, kept):
    """Oracle: the contract; a file cut anywhere is refused."""
    path = tmp_path / "w.safetensors"
    weights.save(path, tree(), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="not a readable|the file is truncated"):
        weights.load(path)


def test_foreign_metadata(tmp_path):
    """Oracle: the contract; a header that is not ours is refused."""
    path = tmp_path / "w.safetensors"
    header = json.dumps({"__metadata__": {"json": "{"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="metadata"):
        weights.load(path)


def test_who_may_read_a_file_may_read_this_one(tmp_path):
    """Oracle: the mode of a file that Python opens."""
    path, plain = tmp_path / "w.safetensors", tmp_path / "plain"
    plain.touch()
    weights.save(path, tree(), {})
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_full_disk_is_one_line(tmp_path):
    """Oracle: the operating system's limit; the file that was there is intact."""
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": np.zeros(3)}, {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written .*free some space"):
            weights.save(path, {"a": np.zeros(3000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_flipped_bit_is_one_line(tmp_path):
    """Oracle: the checksum; other readers see the same numbers beside it."""
    path = tmp_path / "w.safetensors"
    weights.save(path, tree(), {"width": 96})
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["json"]) == {"width": 96}
        names = file.keys()
        compare(
            traverse_util.unflatten_dict(
                {n: file.get_tensor(n).astype("float32") for n in names}, sep="/"
            ),
            tree(),
            rtol=2**-11,
        )
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"weights: {path}: damaged: .*checksum"):
        weights.load(path)


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("", "/b"), ("a/b", "a/b/c")]
)
def test_a_tensor_in_the_place_of_a_group_is_one_line(tmp_path, names):
    """Oracle: no tree has both; fuzzing found the traceback."""
    path = tmp_path / "w.safetensors"
    save_file({name: np.zeros(2, np.float32) for name in names}, path)
    with pytest.raises(UserError, match="in the place of a group"):
        weights.load(path)


def test_half_a_character_in_a_name_is_refused(tmp_path):
    """Oracle: the library, which refuses such a header too."""
    header = rb'{"\udb78": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        weights.load(path)
