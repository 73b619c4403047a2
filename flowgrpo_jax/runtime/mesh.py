"""Device mesh, sharding rules as data, and parameters in shards.

There are two axes, `data` and `fsdp`. Both split the microbatches; `fsdp` also splits
the parameters. The shape of a microbatch never depends on the mesh: with more devices
each loops over fewer microbatches, so results are the same on any number of devices.

A layer makes its parameter whole when it reads it (`Shard.whole`), inside the scan over
blocks and inside what is rematerialised. So a device holds whole weights of one block
at a time, in the backward pass too, where gradients are reduced in the same place.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import stopping

AXES = ("data", "fsdp")
AnyMesh = Mesh | AbstractMesh  # the second has no devices and serves estimates
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(
    shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices`, by default those of all processes.

    `fsdp` lies inside a host first, and inside a slice. One axis may be -1: it takes the
    remaining devices. UserError if the shape does not fit their number.
    """
    devices = sorted(jax.devices(), key=_place) if devices is None else devices
    stopping.reinstall()  # libtpu installs handlers that print a stack
    sizes = _sizes(shape, len(devices))
    if (hosts := jax.process_count()) > 1 and np.prod(sizes) < len(devices):
        raise UserError(
            f"mesh: {dict(shape)}: must take all {len(devices)} devices of {hosts} "
            "processes (one axis may be -1)"
        )
    chosen = np.array(devices[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _place(device: jax.Device) -> tuple[int, int, int]:
    """Slice, process and number of a device: neighbours are close to each other."""
    return getattr(device, "slice_index", 0), device.process_index, device.id


def make_abstract_mesh(shape: Mapping[str, int], count: int) -> AbstractMesh:
    """The mesh that `count` devices would have, without any devices."""
    return AbstractMesh(_sizes(shape, count), AXES, axis_types=(AxisType.Auto,) * 2)


def _sizes(shape: Mapping[str, int], count: int) -> tuple[int, ...]:
    unknown = set(shape) - set(AXES)
    if unknown:
        raise UserError(f"mesh: {min(unknown)}: the axes are {', '.join(AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    others = abs(int(np.prod(sizes)))
    if sizes.count(-1) == 1 and others:
        sizes[sizes.index(-1)] = max(1, count // others)
    if min(sizes) < 1 or np.prod(sizes) > count:
        raise UserError(
            f"mesh: {dict(shape)}: needs positive sizes whose product is at most the "
            f"{count} devices here (one axis may be -1)"
        )
    return tuple(sizes)


def specs(tree: Any, rules: Rules, mesh: AnyMesh) -> Any:
    """PartitionSpec of every leaf: the first rule whose pattern occurs in its path.

    A rule names an axis (or None) per dimension. It is aligned to the last dimension,
    since scanned layers add a leading one. A dimension that the axis's size does not
    divide is not split; a leaf without a rule is replicated.
    """

    def spec(path, leaf) -> PartitionSpec:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        for pattern, axes in rules:
            if re.search(pattern, name) and leaf.ndim >= len(axes):
                padded = (None,) * (leaf.ndim - len(axes)) + tuple(axes)
                return PartitionSpec(
                    *(
                        axis if axis and size % mesh.shape[axis] == 0 else None
                        for axis, size in zip(padded, leaf.shape, strict=True)
                    )
                )
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(spec: Any, mesh: AnyMesh) -> Any:
    """The NamedSharding of one PartitionSpec, or of each one in a tree."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        spec,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def place(tree: Any, spec: Any, mesh: AnyMesh) -> Any:
    """Puts host arrays on the mesh; `spec` is one PartitionSpec or a tree of them.

    Of several processes each places its own part, and all hold the same arrays: none of
    it travels.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings(spec, mesh))
    one = isinstance(spec, PartitionSpec)
    spec = jax.tree.map(lambda _: spec, tree) if one else spec
    return jax.tree.map(
        lambda leaf, s: _placed(leaf, NamedSharding(mesh, s)), tree, spec
    )


def _placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The part of a leaf that this process's devices hold of the whole."""
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = _placed(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data)
    host = np.asarray(leaf)
    with jax.transfer_guard("allow"):  # as device_put, which is asked for
        return jax.make_array_from_callback(
            host.shape, sharding, lambda part: host[part]
        )


def to_host(tree: Any, keep: bool = True) -> Any:
    """Whole numpy arrays of arrays on the mesh, one leaf at a time; all processes call it.

    Without `keep` this process takes part and holds none of them (None).
    """

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                leaf = _replicated(leaf.sharding.mesh)(leaf)
            leaf = leaf.addressable_data(0)
        return jax.device_get(leaf) if keep else None

    return jax.tree.map(whole, tree)


@functools.cache
def _replicated(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def own_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, values) of the leading rows that this process holds, in order."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    values = jax.device_get([shards[start].data for start in sorted(shards)])
    rows = [
        start + np.arange(len(part))
        for start, part in zip(sorted(shards), values, strict=True)
    ]
    return np.concatenate(rows), np.concatenate(values)


def abstract(tree: Any, spec: Any, mesh: AnyMesh) -> Any:
    """The result of `place` without arrays: a jax.ShapeDtypeStruct for each leaf."""
    one = isinstance(spec, PartitionSpec)
    spec = jax.tree.map(lambda _: spec, tree) if one else spec
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, s)
        ),
        tree,
        spec,
    )


def random_key(mesh: AnyMesh, seed: int, *counters: int) -> jax.Array:
    """The key of (seed, counters), on every device of the mesh."""
    with jax.transfer_guard("allow"):  # the seed and the counters come from the host
        key = jax.random.key(seed)
        for counter in counters:
            key = jax.random.fold_in(key, counter)
        return place(key, PartitionSpec(), mesh)


def gather(tree: Any, spec: Any, dtype: DTypeLike | None = None) -> Any:
    """Whole parameters from their shards, inside shard_map.

    Those that have an axis take `dtype` before they travel: where layers compute in
    bf16, whole fp32 copies would be twice the bytes for the same numbers.
    """

    def whole(leaf, leaf_spec):
        for dimension, axis in enumerate(leaf_spec):
            if axis is not None:
                leaf = leaf if dtype is None else leaf.astype(dtype)
                leaf = jax.lax.all_gather(leaf, axis, axis=dimension, tiled=True)
        return leaf

    return jax.tree.map(whole, tree, spec)


@struct.dataclass
class Shard:
    """A device's part of a parameter, inside shard_map.

    `axes`: (dimension counted from the last, -1, mesh axis that splits it). So they
    stay true when a scan over blocks takes the leading dimension off.
    """

    part: jax.Array
    axes: tuple[tuple[int, str], ...] = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)  # of the whole; None for its own

    def whole(self) -> jax.Array:
        """The parameter, from all devices; its gradient is this device's part again.

        Gradients are summed over the devices in fp32, whatever the type of the whole.
        """
        return _whole(self.part, self.axes, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(part, axes, dtype):
    whole = part if dtype is None else part.astype(dtype)
    for dimension, axis in axes:
        whole = jax.lax.all_gather(whole, axis, axis=whole.ndim + dimension, tiled=True)
    return whole


def _whole_forward(part, axes, dtype):
    return _whole(part, axes, dtype), jnp.zeros(0, part.dtype)


def _whole_backward(axes, dtype, like, gradient):
    gradient = gradient.astype(jnp.float32)
    for dimension, axis in axes:
        gradient = _sum_in_parts(gradient, axis, gradient.ndim + dimension)
    return (gradient.astype(like.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


def in_shards(tree: Any, spec: Any, dtype: DTypeLike | None = None) -> Any:
    """Parameters for layers that make them whole: a `Shard` for each that is split.

    Inside shard_map. `dtype` as for `gather`; where an axis has one device, what it
    splits is whole at once.
    """

    def leaf(part, leaf_spec):
        axes = tuple(
            (dimension - len(leaf_spec), axis)
            for dimension, axis in enumerate(leaf_spec)
            if axis is not None
        )
        if any(jax.lax.axis_size(axis) > 1 for _, axis in axes):
            return Shard(part, axes, dtype)
        return part.astype(dtype) if axes and dtype is not None else part

    return jax.tree.map(leaf, tree, spec)


def parts(tree: Any) -> Any:
    """The arrays of a tree (of gradients, say) with `Shard`s."""
    return jax.tree.map(
        lambda leaf: leaf.part if isinstance(leaf, Shard) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Shard),
    )


def sum_gradients(tree: Any, spec: Any) -> Any:
    """Sums gradients over the axes over which `Shard.whole` has not."""
    leaves, structure = jax.tree.flatten(tree)
    over = [
        tuple(sorted(set(AXES) - set(leaf_spec)))
        for leaf_spec in jax.tree.leaves(
            spec, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
    ]
    assert len(over) == len(leaves)
    for axes in dict.fromkeys(over):
        own = [place for place, those in enumerate(over) if those == axes]
        sums = sum_over([leaves[place] for place in own], axes)
        for place, total in zip(own, sums, strict=True):
            leaves[place] = total
    return jax.tree.unflatten(structure, leaves)


def sum_over(values: Any, axes: str | tuple[str, ...]) -> Any:
    """Sums of a tree over devices, inside shard_map: the same for any number of processes."""
    if not (axes and _by_gloo()):
        return jax.lax.psum(values, axes)
    row, back = ravel_pytree(values)  # one array: gloo takes its time for each
    if jnp.issubdtype(row.dtype, jnp.integer):
        return back(jax.lax.psum(row, axes))
    # All devices have the same sum; its largest is a collective again, behind which the
    # program is compiled as it is for one process. A barrier does not do that on CPUs.
    total = functools.reduce(jnp.add, jax.lax.all_gather(row, axes))
    return back(jax.lax.pmax(total, axes))


def _sum_in_parts(values: jax.Array, axis: str, dimension: int) -> jax.Array:
    """This device's part of the sum over an axis, split in a dimension."""
    if not _by_gloo():
        return jax.lax.psum_scatter(
            values, axis, scatter_dimension=dimension, tiled=True
        )
    size = values.shape[dimension] // jax.lax.axis_size(axis)
    start = jax.lax.axis_index(axis) * size
    return jax.lax.dynamic_slice_in_dim(sum_over(values, axis), start, size, dimension)


def _by_gloo() -> bool:
    """Whether CPUs of several processes add up.

    Gloo does not add in the order of the devices, which XLA keeps within a process
    (jax 0.10). On accelerators it makes no difference to which process a device belongs.
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"
