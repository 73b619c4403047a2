"""Host memory and time of loading a transformer folder with random bf16 weights.

    python benchmarks/load.py [--model=sd3.5-medium] [--layers=24] [--folder=DIR]

Writes the folder (5 GB for SD3.5-medium with its positional table), reads its bytes
for comparison, and loads it in a fresh process: from the disk, and again when the
kernel keeps the file in memory. The bars: peak memory 1.3 times the folder, time 3
times that of reading its bytes through one small buffer. Reading them into memory of
their own, as a loader must, is told too. Other work on the machine spoils the times.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flowgrpo_jax.models.files import tensors
from flowgrpo_jax.models.sd3 import transformer_config
from flowgrpo_jax.models.sd3.presets import TRANSFORMERS
from flowgrpo_jax.models.sd3.transformer import MMDiT, MMDiTConfig

_MODEL = flags.DEFINE_enum("model", "sd3.5-medium", TRANSFORMERS, "Which size.")
_LAYERS = flags.DEFINE_integer("layers", None, "Fewer than the model has.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to write; a temporary folder.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "The best of so many is told.")
_LOAD = flags.DEFINE_bool("load", False, "Load `folder` and report (the child).")
CHUNK = 1 << 24


def shapes(config: MMDiTConfig) -> dict:
    """The parameters in bf16, and the whole positional table."""
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (
            (1, 64, 64, config.in_channels),
            (1,),
            (1, 205, config.joint_attention_dim),
            (1, config.pooled_projection_dim),
        )
    ]
    tree = jax.eval_shape(MMDiT(config).init, jax.random.key(0), *structs)["params"]
    side = config.pos_embed_max_size
    tree["pos_embed"]["table"] = jax.ShapeDtypeStruct(
        (side, side, config.width), jnp.bfloat16
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def write(folder: str, config: MMDiTConfig) -> None:
    """Random weights: the layers of a stack have the same, so they take no memory."""
    noise = np.random.default_rng(0).standard_normal(CHUNK, np.float32)
    noise = noise.astype(jnp.bfloat16)

    def fill(path, like):
        stacked = "blocks" in jax.tree_util.keystr(path)
        layer = np.resize(noise, like.shape[1:] if stacked else like.shape)
        return np.broadcast_to(layer, like.shape)

    tree = jax.tree_util.tree_map_with_path(fill, shapes(config))
    tensors.write(folder, tree, transformer_config.table(config))


def read_bytes(folder: str, keep: bool) -> float:
    """Seconds to read all files of the folder, kept or chunk by chunk."""
    kept, buffer = [], bytearray(CHUNK)
    start = time.perf_counter()
    for file in Path(folder).iterdir():
        if keep:
            kept.append(np.fromfile(file, np.uint8))
            continue
        with file.open("rb") as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def evict(folder: str) -> None:
    """The next reader finds nothing of the folder in the kernel's memory."""
    for file in Path(folder).iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: str, config: MMDiTConfig) -> None:
    """Load onto the device and print seconds and the highest memory in bytes."""
    like = shapes(config)
    del like["pos_embed"]["table"]  # a run takes a crop of it
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    start = time.perf_counter()
    positions = [r"pos_embed\.pos_embed"]
    tree = tensors.read(folder, transformer_config.table(config), like, positions)
    jax.block_until_ready(tree)
    seconds = time.perf_counter() - start
    # Not getrusage's maximum: it comes with what the parent had when it forked.
    status = Path("/proc/self/status").read_text().split()
    peak = 1024 * int(status[status.index("VmHWM:") + 1])
    print(seconds, peak, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))


def child(command: list[str], folder: str) -> tuple[float, ...]:
    """What `load` prints in a process of its own."""
    done = subprocess.run(
        [*command, f"--folder={folder}", "--load"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return tuple(map(float, done.stdout.split()[-3:]))


def main(argv: list[str]) -> None:
    del argv
    given = dict(TRANSFORMERS[_MODEL.value])
    layers = _LAYERS.value or given["num_layers"]
    dual = [n for n in given.get("dual_attention_layers", ()) if n < layers]
    given |= {"num_layers": layers, "dual_attention_layers": dual}
    config = MMDiTConfig.from_dict(given)
    if _LOAD.value:
        load(_FOLDER.value, config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = _FOLDER.value or temporary
        me = [sys.executable, __file__, f"--model={_MODEL.value}", f"--layers={layers}"]
        write(folder, config)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        runs = []
        for _ in range(_REPEATS.value):
            evict(folder)
            disk = read_bytes(folder, keep=False)
            cached, kept = read_bytes(folder, keep=False), read_bytes(folder, keep=True)
            loading = child(me, folder)
            evict(folder)
            runs.append((disk, child(me, folder)[0], cached, kept, *loading))
    # The best of each: other programs may disturb any of them.
    disk, from_disk, cached, kept, loading = np.min(runs, axis=0)[:5]
    peak, landed = np.max(runs, axis=0)[5:]
    print(f"folder {size / 1e9:.2f} GB, landed {landed / 1e9:.2f} GB")
    print(
        f"from the disk: reading its bytes {disk:.2f} s, loading {from_disk:.2f} s: "
        f"{from_disk / disk:.2f} times (bar 3)"
    )
    print(
        f"from the page cache: reading its bytes {cached:.2f} s, into memory of their "
        f"own {kept:.2f} s; loading {loading:.2f} s: {loading / cached:.2f} times the "
        f"first (bar 3), {loading / kept:.2f} times the second"
    )
    print(f"peak host memory {peak / 1e9:.2f} GB: {peak / size:.2f} (bar 1.3)")


if __name__ == "__main__":
    app.run(main)
