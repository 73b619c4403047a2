"""Settings of XLA, which must be made before the first array exists."""

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import paths


def configure(cache_dir: str | Path | None = None) -> None:
    """One CPU device per core, and a cache of compiled programs across runs.

    On CPUs the matrices of the networks are too small to be split over threads; one
    device per core, each with its own microbatches, uses all cores fully. Flags that
    the user has set stay as they are; on GPU and TPU the CPU flags have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0))
        if "JAX_NUM_CPU_DEVICES" not in os.environ:
            flags += f" --xla_force_host_platform_device_count={cores}"
        if cores > 1 and "xla_cpu_multi_thread_eigen" not in flags:
            flags += " --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = flags.strip()
    quiet_libtpu()
    if cache_dir or "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # JAX reads that
        cache = paths.local(cache_dir or "~/.cache/flowgrpo_jax/xla").absolute()
        with contextlib.suppress(OSError):  # none where the home folder is read-only
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def quiet_libtpu(devices: str | Path = "/dev") -> None:
    """Silences libtpu where it is installed but no TPU is there.

    It looks for the kind of accelerator and the names of workers; without values for
    them it writes five lines of errors in every command.
    """
    chips = [*Path(devices).glob("accel*"), *Path(devices).glob("vfio")]
    if not chips:
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def one_library(
    mesh: meshes.AnyMesh, dtype: DTypeLike | None
) -> dict[str, str | bool] | None:
    """Compiler options with which rollout and update round bf16 products alike.

    On CPUs XLA gives some matrix products to YNNPACK and others to Eigen, and not the
    same ones in both programs: it gave some of a LoRA's products to YNNPACK in the
    rollout and none in the update. The two add in different orders, and where that
    changes a bf16 digit the first ratio is not exactly 1. In fp32 it always was 1.
    """
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    if not on_cpu or dtype is None or jnp.dtype(dtype) != jnp.bfloat16:
        return None
    return {
        "xla_cpu_experimental_ynn_fusion_type": ""
    }  # gives none to YNNPACK, in jax 0.10 and 0.11
