"""Host memory and time of loading a transformer folder of bf16 weights.

    python benchmarks/load.py [--model=sd3.5-medium] [--layers=24] [--folder=DIR]
    python benchmarks/load.py --model=flux.1-dev --sparse --drop
    python benchmarks/load.py --model=flux.1-dev --sparse --layers=16

Writes the folder, in shards as large as diffusers makes them, reads its bytes for
comparison, and loads it in a fresh process: from the disk, and again when the kernel
keeps the file in memory. The bars: peak host memory what lands and 1.2 times the largest
shard; time 3 times that of reading the bytes through one small buffer. Reading them into
memory of their own, as a loader must, is told too. Other work on the machine spoils the
times.

--sparse writes headers and holes, which take no disk, and tells no times. --drop forgets
every leaf once it is there, as the host does when it goes to an accelerator: so models
are measured that this machine has no memory for.
"""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flowgrpo_jax.config import families
from flowgrpo_jax.models.files import tensors, weight_folders
from flowgrpo_jax.models.spec import ModelSpec

_MODEL = flags.DEFINE_enum("model", "sd3.5-medium", families.released(), "Which size.")
_LAYERS = flags.DEFINE_integer("layers", None, "Of each kind of block at most so many.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to write; a temporary folder.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "The best of so many is told.")
_SPARSE = flags.DEFINE_bool("sparse", False, "Zeros that take no disk; no times.")
_DROP = flags.DEFINE_bool("drop", False, "Forget every leaf once it is there.")
_LOAD = flags.DEFINE_bool("load", False, "Load `folder` and report (the child).")
CHUNK = 1 << 24
BFLOAT16 = np.dtype(jnp.bfloat16)


def network() -> tuple[tensors.Table, Any, Any]:
    """Rename table, and shapes in bf16 of what is learned and of what is not."""
    name = _MODEL.value
    code = families.of(name).code
    model = code.plan(ModelSpec(name, dtype="bfloat16"), None)
    config, most = model.denoiser.config, _LAYERS.value or 1000
    layers: dict[str, Any] = {
        field.name: min(value, most)
        for field in dataclasses.fields(config)
        if field.name.endswith("layers")
        and isinstance(value := getattr(config, field.name), int)
    }
    if dual := getattr(config, "dual_attention_layers", ()):
        layers["dual_attention_layers"] = tuple(n for n in dual if n < most)
    fewer = type(model.denoiser)(dataclasses.replace(config, **layers))
    model = dataclasses.replace(model, denoiser=fewer)
    shapes = code.shapes(model, BFLOAT16)
    return code.table(model), shapes["transformer"], shapes.get("buffers", {})


def write(folder: Path) -> None:
    """All tensors as shards with their index: of random numbers, or of holes."""
    table, *trees = network()
    shards: list[dict[str, Any]] = []
    size = tensors.MAX_SHARD_BYTES
    for tree in trees:
        for name, shape in tensors.names(table, tree).items():
            bytes_ = int(np.prod(shape)) * BFLOAT16.itemsize
            if size + bytes_ > tensors.MAX_SHARD_BYTES:
                shards.append({})
                size = 0
            entry = {"dtype": "BF16", "shape": shape}
            shards[-1][name] = entry | {"data_offsets": (size, size + bytes_)}
            size += bytes_
    noise = np.random.default_rng(0).standard_normal(CHUNK, np.float32)
    noise = noise.astype(BFLOAT16).tobytes()
    places, stem = {}, weight_folders.STEMS[0]
    for number, shard in enumerate(shards, 1):
        file = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, file.name)
        header = json.dumps(shard).encode()
        end = (
            8 + len(header) + max(entry["data_offsets"][1] for entry in shard.values())
        )
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            while not _SPARSE.value and (left := end - stream.tell()):
                stream.write(noise[:left])
            stream.truncate(end)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}{weight_folders.INDEX}").write_text(json.dumps(index))


def read_bytes(folder: Path, keep: bool) -> float:
    """Seconds to read all files of the folder, kept or chunk by chunk."""
    kept, buffer = [], bytearray(CHUNK)
    start = time.perf_counter()
    for file in folder.iterdir():
        if keep:
            kept.append(np.fromfile(file, np.uint8))
            continue
        with file.open("rb") as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def evict(folder: Path) -> None:
    """The next reader finds nothing of the folder in the kernel's memory."""
    for file in folder.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(field: str) -> int:
    """Bytes of this process, as Linux tells them.

    Not getrusage's maximum: it comes with what the parent had when it forked.
    """
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index(f"{field}:") + 1])


def load(folder: Path) -> None:
    """Load onto the device; print seconds and bytes: before, the most, of the leaves."""
    table, like, beside = network()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    ignore = [re.escape(name) for name in tensors.names(table, beside)]
    before, start, kept, made = status("VmRSS"), time.perf_counter(), [], 0
    for _, leaf in tensors.leaves(folder, table, like, ignore):
        made += jax.block_until_ready(leaf).nbytes
        if not _DROP.value:
            kept.append(leaf)
        del leaf
    print(time.perf_counter() - start, before, status("VmHWM"), made)


def child(command: list[str]) -> tuple[float, ...]:
    """What `load` prints in a process of its own."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return tuple(map(float, done.stdout.split()[-4:]))


def tell_memory(folder: Path, before: float, peak: float, made: float) -> None:
    """The memory of one load beside its bar."""
    largest = max(file.stat().st_size for file in folder.iterdir())
    landed = 0.0 if _DROP.value else made
    print(
        f"weights {made / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB, landed on "
        f"the host {landed / 1e9:.2f} GB"
    )
    print(
        f"peak host memory {peak / 1e9:.2f} GB, {before / 1e9:.2f} of it before loading: "
        f"beyond what landed {(peak - landed) / 1e9:.2f} GB, "
        f"{(peak - landed) / largest:.2f} times the largest shard (bar 1.2)"
    )


def tell_times(folder: Path, command: list[str]) -> None:
    """Times of loading beside those of reading; the best of each."""
    runs = []
    for _ in range(_REPEATS.value):
        evict(folder)
        disk = read_bytes(folder, keep=False)
        cached, kept = read_bytes(folder, keep=False), read_bytes(folder, keep=True)
        loading = child(command)[0]
        evict(folder)
        runs.append((disk, child(command)[0], cached, kept, loading))
    # Other programs may disturb any of them.
    disk, from_disk, cached, kept, loading = np.min(runs, axis=0)
    print(
        f"from the disk: reading its bytes {disk:.2f} s, loading {from_disk:.2f} s: "
        f"{from_disk / disk:.2f} times (bar 3)"
    )
    print(
        f"from the page cache: reading its bytes {cached:.2f} s, into memory of their "
        f"own {kept:.2f} s; loading {loading:.2f} s: {loading / cached:.2f} times the "
        f"first (bar 3), {loading / kept:.2f} times the second"
    )


def main(argv: list[str]) -> None:
    if _LOAD.value:
        load(Path(_FOLDER.value))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary)
        write(folder)
        command = [sys.executable, *argv, "--load", f"--folder={folder}"]
        command += [f"--model={_MODEL.value}", f"--drop={_DROP.value}"]
        command += [f"--layers={_LAYERS.value}"] if _LAYERS.value else []
        tell_memory(folder, *child(command)[1:])
        if not _SPARSE.value:
            tell_times(folder, command)


if __name__ == "__main__":
    app.run(main)
