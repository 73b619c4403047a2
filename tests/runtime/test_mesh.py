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


def stack_loss(kernels, x):
    """Of layers one after the other, each made whole inside the scan over them."""

    @jax.checkpoint
    def layer(x, kernel):
        if isinstance(kernel["up"], meshes.Shard):
            kernel = {name: shard.whole() for name, shard in kernel.items()}
        up, down = (kernel[name].astype(jnp.float32) for name in ("up", "down"))
        return x + jnp.tanh(x @ up) @ down, None

    return jnp.sum(jax.lax.scan(layer, x, kernels)[0] ** 2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_layers_make_their_parameters_whole(dtype):
    """Oracle: jax.grad of whole weights on one device, over all samples in fp32.

    The program holds one layer's whole kernel, and never all of them.
    """
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    kernels = {name: each["kernel"] for name, each in tree()["blocks"].items()}
    specs = {name: SPECS["blocks"][name]["kernel"] for name in kernels}

    def local(shards, own):
        grads = jax.grad(stack_loss)(meshes.in_shards(shards, specs, dtype), own)
        return meshes.sum_gradients(meshes.parts(grads), specs)

    program = jax.shard_map(
        local,
        mesh=MESH,
        in_specs=(specs, PartitionSpec(meshes.AXES)),
        out_specs=specs,
        check_vma=False,
    )
    placed = meshes.place(kernels, specs, MESH)
    found = jax.jit(program)(placed, x)
    assert {s.data.shape for s in found["up"].addressable_shards} == {(3, 4, 3)}
    cast = jax.tree.map(lambda k: k.astype(dtype or k.dtype), kernels)
    whole = jax.tree.map(lambda k: jnp.asarray(k, jnp.float32), cast)
    expected = jax.grad(stack_loss)(whole, x)
    bar = 1e-2 if dtype else 1e-5  # gradients of a layer are of its type
    for name, gradient in expected.items():
        most = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, atol=bar * most)
    gathers = [
        equation.outvars[0].aval.shape
        for equation in equations(jax.make_jaxpr(program)(placed, x).jaxpr)
        if equation.primitive.name == "all_gather"
    ]
    assert set(gathers) == {(4, 6), (6, 4)}


def equations(jaxpr):
    """All of a program, those of its loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_gradients_are_reduced_in_fp32():
    """Oracle: by hand; 1 + 1/128 and 512, each a bf16, whose sum is none."""
    mesh = mesh_of(1, 2)
    spec = PartitionSpec("fsdp")

    def local(part, weight):
        shard = meshes.in_shards(part, spec, "bfloat16")
        return jax.grad(lambda s: jnp.sum(s.whole() * weight[0].astype("bfloat16")))(
            shard
        ).part

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
    )
    found = jax.jit(program)(np.zeros(4, np.float32), np.float32([1 + 1 / 128, 512]))
    np.testing.assert_array_equal(found, np.full(4, 513 + 1 / 128, np.float32))


def test_an_axis_of_one_device_splits_nothing():
    """Oracle: the contract; whole at once, in the type of the layers."""
    mesh, specs = mesh_of(2, 1), {"kernel": PartitionSpec(None, "fsdp")}

    def local(part):
        whole = meshes.in_shards(part, specs, "bfloat16")
        assert not isinstance(whole["kernel"], meshes.Shard)
        return whole

    program = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False
    )
    made = jax.jit(program)({"kernel": np.ones((4, 4), np.float32)})
    assert made["kernel"].dtype == "bfloat16"


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
