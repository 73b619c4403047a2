"""Trees to and from the files of torch libraries, and what a damaged file says."""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import safetensors_files, tensors
from flowgrpo_jax.models.files.tensors import Rule

DEPTH, FIRST, PATCH = 3, 2, 2
TABLE = (
    Rule("embed/table", "embed.weight"),
    Rule("patch/kernel", "patch.proj.weight", "patch", patch=PATCH),
    Rule("conv/kernel", "conv.weight", "conv"),
    Rule("(conv|patch|out)/bias", r"\1.bias"),
    Rule("out/kernel", "out.weight", "dense"),
    Rule(
        r"blocks/(\w+)/qkv/kernel",
        tuple(rf"layers.{{layer}}.\1.{part}.weight" for part in "qkv"),
        "dense",
        first=FIRST,
    ),
    Rule(
        r"blocks/(\w+)/qkv/bias",
        tuple(rf"layers.{{layer}}.\1.{part}.bias" for part in "qkv"),
        first=FIRST,
    ),
    Rule("scale", "scale"),
)
SHAPES = {
    "embed/table": (6, 5),
    "patch/kernel": (PATCH * PATCH * 3, 8),
    "patch/bias": (8,),
    "conv/kernel": (3, 2, 4, 8),
    "conv/bias": (8,),
    "out/kernel": (8, 4),
    "out/bias": (4,),
    "blocks/attn/qkv/kernel": (DEPTH, 8, 24),
    "blocks/attn/qkv/bias": (DEPTH, 24),
    "scale": (),
}
# Written out by hand: what torch would call and shape them.
THEIRS = {
    "embed.weight": (6, 5),
    "patch.proj.weight": (8, 3, 2, 2),
    "patch.bias": (8,),
    "conv.weight": (8, 4, 3, 2),
    "conv.bias": (8,),
    "out.weight": (4, 8),
    "out.bias": (4,),
    "scale": (),
} | {
    f"layers.{layer}.attn.{part}.{name}": shape
    for layer in (2, 3, 4)
    for part in "qkv"
    for name, shape in (("weight", (8, 8)), ("bias", (8,)))
}


def like(dtype=jnp.float32, spec=None, mesh=None):
    def leaf(shape):
        sharding = None
        if spec is not None:
            wanted = spec if len(shape) == 3 else PartitionSpec()
            sharding = NamedSharding(mesh, wanted)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    flat = {name: leaf(shape) for name, shape in SHAPES.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def theirs(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in THEIRS.items()}


@pytest.fixture
def file(tmp_path):
    """A file that the safetensors library itself wrote."""
    save_file(theirs(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def check_values(tree, given):
    """Oracle: the layouts written out with numpy, one leaf at a time."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert flat.keys() == SHAPES.keys()
    for name in ("embed/table", "scale", "out/bias", "patch/bias"):
        stored = given[name.replace("/table", "/weight").replace("/", ".")]
        np.testing.assert_array_equal(flat[name], stored)
    np.testing.assert_array_equal(flat["out/kernel"], given["out.weight"].T)
    for layer in range(DEPTH):
        parts = [given[f"layers.{FIRST + layer}.attn.{p}.weight"].T for p in "qkv"]
        np.testing.assert_array_equal(
            flat["blocks/attn/qkv/kernel"][layer], np.concatenate(parts, axis=-1)
        )
        parts = [given[f"layers.{FIRST + layer}.attn.{p}.bias"] for p in "qkv"]
        np.testing.assert_array_equal(
            flat["blocks/attn/qkv/bias"][layer], np.concatenate(parts)
        )
    for out, into, row, column in np.ndindex(8, 3, 2, 2):
        place = (row * PATCH + column) * 3 + into
        stored = given["patch.proj.weight"][out, into, row, column]
        assert flat["patch/kernel"][place, out] == stored
    for out, into, row, column in np.ndindex(8, 4, 3, 2):
        stored = given["conv.weight"][out, into, row, column]
        assert flat["conv/kernel"][row, column, into, out] == stored


def test_names():
    """Oracle: the names and shapes written out above."""
    assert tensors.names(TABLE, like()) == THEIRS


def test_read(file):
    """Oracle: a file of the safetensors library, and numpy's transposes."""
    tree = tensors.read(file, TABLE, like())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    check_values(tree, theirs())


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec(None, None, "b"),  # across the parts of a fused projection
        PartitionSpec(None, "a", "b"),
        PartitionSpec(None, ("a", "b"), None),
    ],
)
def test_read_to_a_sharding(file, spec):
    """Oracle: the same values, lying where `like` says."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    tree = tensors.read(file, TABLE, like(spec=spec, mesh=mesh))
    leaf = tree["blocks"]["attn"]["qkv"]["kernel"]
    assert leaf.sharding == NamedSharding(mesh, spec)
    check_values(jax.device_get(tree), theirs())


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_are_cast(tmp_path, stored):
    """Oracle: numpy's own casts, from and to bfloat16 too."""
    given = theirs(stored)
    save_file(given, tmp_path / "w.safetensors")
    for wanted in (jnp.float32, jnp.bfloat16):
        tree = tensors.read(tmp_path / "w.safetensors", TABLE, like(wanted))
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(wanted)}
        check_values(tree, {n: v.astype(wanted) for n, v in given.items()})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("most", [1, 700, 10**9])
def test_write_and_read_back(tmp_path, dtype, most):
    """Oracle: bit equality, and the library that reads it: names, types, values."""
    save_file(theirs(dtype), tmp_path / "w.safetensors")
    tree = tensors.read(tmp_path / "w.safetensors", TABLE, like(dtype))
    folder = tmp_path / "folder"
    tensors.write(folder, tree, TABLE, {"_class_name": "Net"}, max_shard_bytes=most)
    again = tensors.read(folder, TABLE, like(dtype))
    for one, other in zip(*map(jax.tree.leaves, (tree, again)), strict=True):
        assert one.tobytes() == other.tobytes() and one.dtype == other.dtype

    stem = "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    if most == 10**9:
        assert shards == [f"{stem}.safetensors"] and not index.exists()
    else:
        places = json.loads(index.read_text())["weight_map"]
        assert places.keys() == THEIRS.keys() and set(places.values()) == set(shards)
        assert shards[0] == f"{stem}-00001-of-{len(shards):05d}.safetensors"
    read = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            read |= {n: opened.get_tensor(n).float().numpy() for n in opened.keys()}
    assert read.keys() == THEIRS.keys()
    for name, value in theirs(dtype).items():
        np.testing.assert_array_equal(read[name], value.astype(np.float32))


def test_mixed_types_are_aligned(tmp_path):
    """Oracle: torch, which refuses an fp32 tensor that starts at an odd place."""
    tree = {"a": np.ones(3, np.int8), "b": np.full(5, 2.0, np.float32)}
    table = (Rule("(a|b)", r"\1"),)
    tensors.write(tmp_path / "w.safetensors", tree, table)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as opened:
        assert opened.get_tensor("b").tolist() == [2.0] * 5
    assert tensors.names(table, tree) == {"a": (3,), "b": (5,)}


def test_writing_again_leaves_nothing_old(tmp_path):
    """Oracle: the contract; shards and index of an earlier write are gone."""
    tree = {"a": np.ones(8), "b": np.zeros(8)}
    table = (Rule("(a|b)", r"\1"),)
    tensors.write(tmp_path, tree, table, {}, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    tree = {"a": np.zeros(8), "b": np.ones(8)}
    tensors.write(tmp_path, tree, table, {"width": 8})
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert tensors.read(tmp_path, table, tree)["b"].all()


def spoil(given, what):
    """A dict of tensors with one fault."""
    given = dict(given)
    if what == "missing":
        del given["layers.3.attn.k.weight"]
    if what == "extra":
        given["layers.5.attn.q.weight"] = np.zeros((8, 8), np.float32)
    if what == "shape":
        given["layers.4.attn.v.bias"] = np.zeros(9, np.float32)
    return given


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", r"tensor layers\.3\.attn\.k\.weight: missing"),
        ("extra", r"tensor layers\.5\.attn\.q\.weight: nothing in the network"),
        ("shape", r"tensor layers\.4\.attn\.v\.bias: shape \[9\].* asks for \[8\]"),
    ],
)
def test_wrong_tensors(tmp_path, what, message):
    """Oracle: the contract; one line that names the tensor."""
    save_file(spoil(theirs(), what), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        tensors.read(tmp_path / "w.safetensors", TABLE, like())
    assert "\n" not in str(caught.value)


def test_ignored_tensors(tmp_path):
    """Oracle: the contract; `ignore` takes whole names."""
    save_file(spoil(theirs(), "extra"), tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    check_values(tensors.read(path, TABLE, like(), [r"layers\.5\..*"]), theirs())
    with pytest.raises(UserError, match="layers.5"):
        tensors.read(path, TABLE, like(), [r"layers\.5"])


def test_truncated(file):
    """Oracle: the contract; the tensor whose bytes are not all there is named."""
    with safe_open(file, framework="np") as opened:
        last = list(opened.offset_keys())[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"tensor {last}: the file is truncated"):
        tensors.read(file, TABLE, like())


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_cut_in_the_header(file, kept):
    """Oracle: the contract; not taken for a file of no tensors."""
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        tensors.read(file, TABLE, like())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        [],
    ],
)
def test_nonsense_in_the_header(file, entry):
    """Oracle: the contract."""
    text = json.dumps({"scale": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        tensors.read(file, TABLE, like())


def test_folders_that_cannot_be_read(tmp_path):
    """Oracle: the contract; every one a line of its own."""

    def message():
        with pytest.raises(UserError) as caught:
            tensors.read(tmp_path / "folder", TABLE, like())
        return str(caught.value)

    assert "no such file or folder" in message()
    (tmp_path / "folder").mkdir()
    assert "no .safetensors file" in message()
    for name in ("a", "b"):
        save_file(theirs(), tmp_path / "folder" / f"{name}.safetensors")
    assert "which of a.safetensors, b.safetensors?" in message()
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text("{}")
    assert "not an index of shards" in message()
    index.write_text(json.dumps({"weight_map": {"scale": "c.safetensors"}}))
    assert "names this shard" in message()
    index.write_text(json.dumps({"weight_map": {"foreign": "a.safetensors"}}))
    assert "tensor foreign: the index places it here" in message()


def test_a_leaf_without_a_rule():
    """Oracle: the contract; a table with a hole is a mistake of the program."""
    with pytest.raises(ValueError, match="embed/table: no row"):
        tensors.names(TABLE[1:], like())


def test_each_part_is_read_once(file, monkeypatch):
    """Oracle: counting; devices that hold the same part share one reading of it."""
    read, part = [], tensors._part

    def counted(*arguments):
        read.append(part(*arguments))
        return read[-1]

    monkeypatch.setattr(tensors, "_part", counted)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    spec = PartitionSpec(None, None, "b")
    tensors.read(file, TABLE, like(spec=spec, mesh=mesh))
    kernel = [p.shape for p in read if p.ndim == 3]
    assert kernel == [(DEPTH, 8, 6)] * 4


def test_memory_is_what_lands_and_one_stack(tmp_path):
    """Oracle: the allocations that numpy makes while 67 MB become 34."""
    depth, width, count = 4, 512, 16
    given = {
        f"{name}.{layer}.weight": np.zeros((width, width), np.float32)
        for name in range(count)
        for layer in range(depth)
    }
    save_file(given, tmp_path / "w.safetensors")
    table = (Rule(r"(\d+)", r"\1.{layer}.weight", "dense"),)
    target = jax.ShapeDtypeStruct((depth, width, width), jnp.bfloat16)
    wanted = {str(n): target for n in range(count)}
    tracemalloc.start()
    try:
        tree = tensors.read(tmp_path / "w.safetensors", table, wanted)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    landed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert landed <= peak <= landed * (1 + 1 / count)


@pytest.mark.parametrize("stack, rows", [((), 7), ((1,), 7), ((), 1), ((), 0)])
def test_a_tensor_alone_is_read_whole(tmp_path, stack, rows):
    """Oracle: what was saved, turned; the threads' shares of its rows differ."""
    # Not another case's numbers: those may lie in memory that is taken again.
    given = np.arange(5 * rows, dtype=np.float32).reshape(5, rows) + 100 * len(stack)
    name = "w.0.weight" if stack else "w.weight"
    save_file({name: given}, tmp_path / "w.safetensors")
    rule = Rule("w", "w.{layer}.weight" if stack else name, "dense")
    wanted = {"w": jax.ShapeDtypeStruct((*stack, rows, 5), jnp.float32)}
    tree = tensors.read(tmp_path / "w.safetensors", (rule,), wanted)
    np.testing.assert_array_equal(tree["w"].reshape(rows, 5), given.T)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 512), (256, 513), (600, 1100)])
def test_a_turned_matrix_is_copied_whole(rows, columns):
    """Oracle: numpy's own transpose; tiles meet and the last ones are smaller."""
    turned = np.arange(rows * columns, dtype=np.float32).reshape(columns, rows).T
    target = np.full(turned.shape, -1.0, np.float32)
    safetensors_files.copy(target, turned)
    np.testing.assert_array_equal(target, turned)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(tmp_path, dtype, value):
    """Oracle: the contract; the largest finite values of either sign pass."""
    most = jnp.finfo(dtype).max
    given = np.array([[most, -most, 0], [1, -0.0, 2]], dtype)
    rule, path = (Rule("w", "w", "dense"),), tmp_path / "w.safetensors"
    save_file({"w": given}, path)
    wanted = {"w": jax.ShapeDtypeStruct((3, 2), dtype)}
    np.testing.assert_array_equal(tensors.read(path, rule, wanted)["w"], given.T)
    given[1, 2] = value
    save_file({"w": given}, path)
    with pytest.raises(UserError, match="tensor w: holds values that are not finite"):
        tensors.read(path, rule, wanted)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "transformer.", "model.diffusion."])
def test_a_prefix_of_all_names_is_shown(tmp_path, prefix):
    """Oracle: the contract; the line has a name of the file and what was expected."""
    path = tmp_path / "w.safetensors"
    save_file({f"{prefix}{name}": value for name, value in theirs().items()}, path)
    with pytest.raises(UserError, match=rf"tensor (\S+): .* called {prefix}\1: take"):
        tensors.read(path, TABLE, like())
    save_file({"other": np.zeros(3)}, path)
    with pytest.raises(UserError, match="missing; the first tensor .* is other$"):
        tensors.read(path, TABLE, like())


def test_every_bit_counts(tmp_path):
    """Oracle: what was written; a bit flipped anywhere, header included, is one line."""
    tree = {"a": np.linspace(-1, 1, 64, dtype=np.float32)}
    table, path = (Rule("a", "a"),), tmp_path / "w.safetensors"
    tensors.write(path, tree, table)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        try:
            found = tensors.read(path, table, tree)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        # Of a key that names no checksum any more only other readers could know.
        assert b"flowgrpo_jax.crc32" not in spoilt
        np.testing.assert_array_equal(found["a"], tree["a"])
    path.write_bytes(whole)
    np.testing.assert_array_equal(tensors.read(path, table, tree)["a"], tree["a"])


def header(entries, data=bytes(8)):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"", "not a readable safetensors file"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "no JSON object"),
        (struct.pack("<Q", 100_000) + b'{"a":' * 20_000, "not a readable"),
        (struct.pack("<Q", 2**63) + b"{}", "longer than the file"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "a: "),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "end"),
        (
            header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}),
            "sha",
        ),
        (header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}), "sh"),
        (header({"__metadata__": {"a": 1}}, b""), "metadata"),
        (header({"__metadata__": [1]}, b""), "not a readable"),
        (header({"__metadata__": False}, b""), "not a readable"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, data, message):
    """Oracle: the safetensors library refuses them too."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        tensors.read(tmp_path, TABLE, like())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SafetensorError):
        safe_open(path, framework="np")


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], "pytorch_model.bin: a pickle"),
        (["model-00001-of-00002.safetensors"], "the index .* is missing"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "which of model.bf16"),
        (["config.json"], "no .safetensors file in it"),
    ],
)
def test_folders_without_weights(tmp_path, files, message):
    """Oracle: the contract; the line names the file or the folder."""
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"weights: {tmp_path}.*{message}"):
        tensors.read(tmp_path, TABLE, like())


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "index, shards",
    [
        (f"{STEM}.safetensors.index.json", f"{STEM}-0000{{}}-of-00002"),
        (f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000{{}}-of-00002"),
        (f"{STEM}.fp16.safetensors.index.json", f"{STEM}-0000{{}}-of-00002.fp16"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002"),
    ],
)
def test_shards_of_a_variant(tmp_path, index, shards):
    """Oracle: the names that diffusers gives; without a variant the plain file wins."""
    names = [f"{shards.format(number)}.safetensors" for number in (1, 2)]
    given = list(theirs().items())
    half = len(given) // 2
    places = {}
    for name, part in zip(names, (given[:half], given[half:]), strict=True):
        save_file(dict(part), tmp_path / name)
        places |= {tensor: name for tensor, _ in part}
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    check_values(tensors.read(tmp_path, TABLE, like()), theirs())
    plain = {name: np.asarray(value + 1) for name, value in theirs().items()}
    save_file(plain, tmp_path / f"{STEM}.safetensors")
    if index != f"{STEM}.safetensors.index.json":  # which diffusers prefers
        check_values(tensors.read(tmp_path, TABLE, like()), plain)


@pytest.mark.parametrize("shard", ["../w.safetensors", "/w.safetensors", 3, None, ""])
def test_an_index_stays_in_its_folder(tmp_path, shard):
    """Oracle: the contract; what lies elsewhere is not read."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"scale": shard}}))
    with pytest.raises(UserError, match=f"{index}: tensor scale: .*beside the index"):
        tensors.read(tmp_path, TABLE, like())
