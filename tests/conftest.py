"""Shapes and types of the package are checked while the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook("flowgrpo_jax", "beartype.beartype")
