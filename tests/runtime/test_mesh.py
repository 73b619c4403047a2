"""Meshes, sharding rules, and the collectives of the programs, on 8 host devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import mesh as meshes

WHOLE = PartitionSpec()
RULES = (
    (r"up/kernel", (None, "fsdp")),
    (r"down/kernel", ("fsdp", None)),
    (r"table", ("data", "fsdp")),
)


def mesh_of(data: int, fsdp: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * 2)


MESH = mesh_of(2, 2)


def tree():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "blocks": {
            "up": {"kernel": normal(3, 4, 6), "bias": normal(3, 6)},
            "down": {"kernel": normal(3, 6, 4), "bias": normal(3, 4)},
        },
        "up": {"kernel": normal(4, 5)},
        "table": normal(4, 6),
        "count": np.float32(7.0).reshape(()),
    }


SPECS = {
    "blocks": {
        "up": {"kernel": PartitionSpec(None, None, "fsdp"), "bias": WHOLE},
        "down": {"kernel": PartitionSpec(None, "fsdp", None), "bias": WHOLE},
    },
    "up": {"kernel": PartitionSpec(None, None)},  # 2 does not divide 5
    "table": PartitionSpec("data", "fsdp"),
    "count": WHOLE,
}


# -- the mesh ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ({"data": 8, "fsdp": 1}, (8, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": -1, "fsdp": 3}, (2, 3)),  # two devices are left out
        ({"data": 2}, (2, 1)),
        ({"fsdp": -1}, (1, 8)),
        ({}, (1, 1)),
    ],
)
def test_make_mesh(shape, sizes):
    """Oracle: by hand, for 8 devices; -1 is what the other axis leaves."""
    mesh = meshes.make_mesh(shape)
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("data", "fsdp")
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 16, "fsdp": 1},
        {"data": 3, "fsdp": 3},
        {"data": 0, "fsdp": 1},
        {"data": -2, "fsdp": 1},
        {"data": -1, "fsdp": -1},
        {"data": -1, "fsdp": 0},
        {"data": -1, "fsdp": -2},
        {"data": -1, "fsdp": 16},
    ],
)
def test_make_mesh_errors(shape):
    """Oracle: the contract; one line with the shape and the number of devices."""
    with pytest.raises(UserError, match=r"^mesh: \{.*8 devices"):
        meshes.make_mesh(shape)


def test_unknown_axis():
    """Oracle: the contract; the line names the axis and the allowed ones."""
    with pytest.raises(UserError, match="mesh: tensor: the axes are data, fsdp"):
        meshes.make_mesh({"data": 1, "tensor": 2})


# -- specs -------------------------------------------------------------------------


def test_specs():
    """Oracle: by hand; aligned to the last dimension, whole where it does not divide."""
    assert meshes.specs(tree(), RULES, MESH) == SPECS


def test_first_rule_wins():
    """Oracle: the contract; and a leaf with fewer dimensions than a rule is whole."""
    rules = ((r"kernel", ("fsdp",)), (r"kernel", (None, "fsdp")))
    leaf = {"kernel": np.zeros((4, 4)), "small/kernel": np.zeros(())}
    assert meshes.specs(leaf, rules, MESH) == {
        "kernel": PartitionSpec(None, "fsdp"),
        "small/kernel": WHOLE,
    }


# -- placement and collectives -----------------------------------------------------


def test_place():
    """Oracle: an invariance; the values are the host's, the shards are the specs'."""
    placed = meshes.place(tree(), SPECS, MESH)
    jax.tree.map(np.testing.assert_array_equal, placed, tree())
    kernel = placed["blocks"]["up"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 4, 3)}
    assert {s.data.shape for s in placed["table"].addressable_shards} == {(2, 3)}
    assert placed["count"].is_fully_replicated
    assert len(placed["count"].addressable_shards) == 4


def test_place_with_one_spec():
    """Oracle: the contract; one PartitionSpec serves the whole tree."""
    placed = meshes.place(tree(), WHOLE, MESH)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
    split = meshes.place({"x": np.arange(8.0)}, PartitionSpec(meshes.AXES), MESH)
    shards = [shard.data.tolist() for shard in split["x"].addressable_shards]
    assert shards == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]


def test_gather():
    """Oracle: an invariance; every device sees the whole tree, whatever the specs."""

    def local(shards):
        whole = meshes.gather(shards, SPECS)
        return jax.tree.map(lambda leaf: leaf[None], whole)

    program = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(SPECS,),
        out_specs=PartitionSpec(meshes.AXES),
        check_vma=False,
    )
    seen = jax.jit(program)(meshes.place(tree(), SPECS, MESH))
    jax.tree.map(
        lambda leaf, original: np.testing.assert_array_equal(
            leaf, np.broadcast_to(original, (4, *original.shape))
        ),
        seen,
        tree(),
    )


def test_gradients_in_shards():
    """Oracle: float64 sums of whole arrays; the result has the specs of the tree."""
    rng = np.random.default_rng(1)
    each = jax.tree.map(
        lambda leaf: rng.standard_normal((4, *leaf.shape)).astype(np.float32), tree()
    )

    def local(own):
        shards = meshes.scatter_gradients(jax.tree.map(lambda x: x[0], own), SPECS)
        return meshes.sum_gradients(shards, SPECS)

    program = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=PartitionSpec(meshes.AXES),
        out_specs=SPECS,
        check_vma=False,
    )
    total = jax.jit(program)(meshes.place(each, PartitionSpec(meshes.AXES), MESH))
    jax.tree.map(
        lambda leaf, parts: np.testing.assert_allclose(
            leaf, parts.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-6
        ),
        total,
        each,
    )
    assert {s.data.shape for s in total["table"].addressable_shards} == {(2, 3)}


def test_gather_then_reduce_is_the_gradient():
    """Oracle: jax.grad on one device; the sum of losses over eight samples."""
    x = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    weights = {"up": {"kernel": tree()["blocks"]["up"]["kernel"][0]}}
    specs = meshes.specs(weights, RULES, MESH)

    def loss(weights, x):
        return jnp.sum(jnp.tanh(x @ weights["up"]["kernel"]) ** 2)

    def local(shards, own):
        grads = jax.grad(loss)(meshes.gather(shards, specs), own)
        return meshes.sum_gradients(meshes.scatter_gradients(grads, specs), specs)

    program = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(specs, PartitionSpec(meshes.AXES)),
        out_specs=specs,
        check_vma=False,
    )
    found = jax.jit(program)(meshes.place(weights, specs, MESH), x)
    expected = jax.grad(loss)(weights, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(found),
        jax.device_get(expected),
    )


def test_random_key():
    """Oracle: jax.random's fold_in; on any mesh, inside a ban on transfers."""
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), 7)
    with jax.transfer_guard("disallow"):
        keys = [meshes.random_key(mesh, 3, 5, 7) for mesh in (MESH, mesh_of(8, 1))]
    for key in keys:
        assert key.is_fully_replicated
        np.testing.assert_array_equal(
            jax.random.key_data(key), jax.random.key_data(expected)
        )
