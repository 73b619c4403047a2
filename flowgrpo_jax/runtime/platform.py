"""What must be said to XLA before the first array exists."""

import os
from pathlib import Path

import jax

# Flags that XLA does not know end the process: this one is there in jax 0.10 and 0.11.
EIGEN_ONLY = "--xla_cpu_experimental_ynn_fusion_type="


def configure(cache_dir: str | Path | None = None) -> None:
    """One CPU device per core, and a cache of compiled programs across runs.

    On CPUs the network's matrices are too small to split over threads; one device per
    core, each looping over microbatches of its own, uses the cores fully. And every
    matrix product is Eigen's: XLA would give some to YNNPACK, but not the same ones in
    two programs (of a LoRA's products those of the rollout, not those of the update),
    and where the two round differently a first ratio is not exactly 1. Flags that the
    user has set stay; on GPU and TPU the CPU flags have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in flags:
        flags += f" {EIGEN_ONLY}"
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0))
        flags += f" --xla_force_host_platform_device_count={cores}"
        if cores > 1 and "xla_cpu_multi_thread_eigen" not in flags:
            flags += " --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = flags.strip()
    cache = Path(cache_dir or Path.home() / ".cache" / "flowgrpo_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
