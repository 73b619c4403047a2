"""What a run began with: whether it is there still, and whether anything differs from it.

A workdir keeps a digest of the base model's weights, so that they may lie elsewhere at
the next start, and others in their place are noticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.config import families
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.flow_model import Variables
from flowgrpo_jax.runtime import cluster
from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime.workdir import atomic_write, read_config
from flowgrpo_jax.worlds.registry import WORLDS

UNADAPTED = "not adapted"
NAMES = {"ema": "the EMA", "learner": "the learner"}
_FILE = "base_model.json"
_BLOCK = 1 << 18  # elements of a host array that are summed at once: a cache's worth


def at(
    config: ml_collections.ConfigDict, path: str | None
) -> ml_collections.ConfigDict:
    """The config whose base model is read from `path`, the value of --model, if any.

    UserError if that cannot be the model that the config names.
    """
    if path is None:
        return config
    if families.of(config.model) != families.of(path):
        raise UserError(
            f"--model: {path}: is not what the run began with: that was {config.model}"
        )
    if assemble.starts_fresh(config):
        raise UserError(f"--model: {path}: the run begins with random weights: drop it")
    config = configs.from_json(config.to_dict())
    config.model_path = path
    return config


def moved(
    config: ml_collections.ConfigDict, workdir: str | Path
) -> ml_collections.ConfigDict:
    """The config for a workdir whose run names another place of the same base model.

    The run keeps its name, and is read from where the given config says; whether the
    weights are the same ones is for `keep` to find out.
    """
    try:
        held = str(read_config(workdir)["model"])
    except (UserError, KeyError):  # no run, or a broken one: not for here
        return config
    names = {held, config.model}
    if (
        len(names) == 1
        or names & set(WORLDS)
        or families.of(held) != families.of(config.model)
        or not (Path(workdir) / _FILE).exists()
    ):
        return config
    config = configs.from_json(config.to_dict())
    config.model_path = config.model_path or config.model
    config.model = held
    return config


def keep(
    workdir: str | Path, config: ml_collections.ConfigDict, loaded: Variables
) -> None:
    """Note what a run begins with; UserError if that is not what it began with."""
    if assemble.starts_fresh(config):  # what a seed gives on this kind of machine
        return
    found = digest(_weights(loaded))
    cluster.same({f"weights of {config.model}": found})
    path = Path(workdir) / _FILE

    def keep_it() -> None:
        _compare(path, config, found)
        if not path.exists():
            held = {"model": config.model, "sha256": found}
            atomic_write(path, json.dumps(held, indent=2) + "\n")

    cluster.first(keep_it)


def check(
    workdir: str | Path, config: ml_collections.ConfigDict, loaded: Variables
) -> None:
    """UserError if the run in `workdir` began with other weights than these.

    Nothing is known of a run of an earlier version, which kept no digest.
    """
    path = Path(workdir) / _FILE
    if not assemble.starts_fresh(config) and path.exists():
        _compare(path, config, digest(_weights(loaded)))


def _compare(path: Path, config: ml_collections.ConfigDict, found: str) -> None:
    """UserError if another digest is kept in the file `path`, if that is there."""
    if not path.exists():
        return
    try:
        began = json.loads(path.read_text())["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"workdir: {path}: cannot be read ({error}): delete it if the weights of "
            f"{config.model} are those that the run began with"
        ) from error
    if began != found:
        raise UserError(
            f"model: {config.model_path or config.model}: other weights than the run in "
            f"{path.parent} began with: say where those lie now with --model=FOLDER, or "
            "take another --workdir"
        )


def _weights(loaded: Variables) -> Variables:
    """Without what no run learns: the sizes of pictures say how much of it is read."""
    return {name: tree for name, tree in loaded.items() if name != "buffers"}


# -- a digest of weights --------------------------------------------------------------


def digest(variables: Variables) -> str:
    """SHA-256 over names, shapes, types and a sum of the bits of all leaves.

    Of the values as they were loaded: whatever files, host or mesh they are on. Bits
    are weighted by place, so that it matters where a value stands.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    placed = {name: leaf for name, leaf in flat.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_sums_on_devices(placed))
    return _sha256(
        flat,
        {
            name: int(sums[name]) if name in sums else _sum_on_host(leaf)
            for name, leaf in flat.items()
        },
    )


def _sha256(flat: dict[str, Any], sums: dict[str, int]) -> str:
    """Of names, shapes, types and sums of leaves."""
    told = {
        name: [list(leaf.shape), jnp.dtype(leaf.dtype).name, sums[name]]
        for name, leaf in flat.items()
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sum_on_host(leaf: Any) -> int:
    """Sum of bits times odd numbers that count up, modulo 2^32."""
    flat = np.ascontiguousarray(leaf).reshape(-1)
    bits = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    odd, total = 2 * np.arange(_BLOCK, dtype=np.uint32) + 1, 0
    for start in range(0, len(bits), _BLOCK):
        part = bits[start : start + _BLOCK].astype(np.uint32)
        total += int(np.sum(part * odd[: len(part)], dtype=np.uint32))
        total += 2 * start * int(np.sum(part, dtype=np.uint32))
    return total % 2**32


@jax.jit  # of all leaves together: there are as many shapes as kinds of layers
def _sums_on_devices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum_on_devices(leaf) for name, leaf in leaves.items()}


def _sum_on_devices(leaf: jax.Array) -> jax.Array:
    """The sum of `_sum_on_host`."""
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    place = jnp.zeros(leaf.shape, jnp.uint32)
    step = 1
    for axis in reversed(range(leaf.ndim)):  # in shards: no array is made flat
        counted = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place + counted * jnp.uint32(step % 2**32)
        step *= leaf.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


# -- what a run made of it ------------------------------------------------------------


def mark(part: Variables) -> str:
    """What is alike for two states of the part that learns, if both are one model.

    Of an adapter whether it changes anything, else a digest of its values. These are
    summed on the host, one leaf after the other: nothing is compiled for it.
    """
    if "lora" in part:
        adapter = meshes.to_host(part)
        return "adapted" if differs(adapter, {}) else UNADAPTED
    flat = traverse_util.flatten_dict(part, sep="/")
    sums = {name: _sum_on_host(meshes.to_host(leaf)) for name, leaf in flat.items()}
    return _sha256(flat, sums)


def differs(part: Variables, base: Variables) -> bool:
    """Whether the variables that a run trained make another model than `base`.

    An adapter does if any of its products is not zero.
    """
    if "lora" in part:
        factors = traverse_util.flatten_dict(part["lora"])
        modules = {path[:-1] for path in factors}
        return any(
            np.any(factors[(*path, "a")]) and np.any(factors[(*path, "b")])
            for path in modules
        )
    held = traverse_util.flatten_dict(base)
    return any(
        not np.array_equal(leaf, held[path])
        for path, leaf in traverse_util.flatten_dict(part).items()
    )


def unmoved(weights: str, iterations: int | None) -> str:
    """The line that tells of weights, ema or learner, that nothing differs in."""
    other = ", or see whether --weights=learner has moved" if weights == "ema" else ""
    return (
        f"nothing differs from the base model: {NAMES[weights]} after {iterations} "
        "iterations is what the run began with: train longer or raise "
        f"train.learning_rate{other}"
    )
