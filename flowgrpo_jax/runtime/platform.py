"""What must be said to XLA before the first array exists."""

import os
from pathlib import Path

import jax


def configure(cache_dir: str | Path | None = None) -> None:
    """One CPU device per core, and a cache of compiled programs across runs.

    On CPUs the network's matrices are too small to split over threads; one device per
    core, each looping over microbatches of its own, uses the cores fully. Flags that
    the user has set stay; on GPU and TPU the CPU flags have no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0))
        flags += f" --xla_force_host_platform_device_count={cores}"
        if cores > 1 and "xla_cpu_multi_thread_eigen" not in flags:
            flags += " --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = flags.strip()
    cache = Path(cache_dir or Path.home() / ".cache" / "flowgrpo_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
