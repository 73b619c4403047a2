"""Shapes and types of the package are checked while the tests run."""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
from jaxtyping import install_import_hook

install_import_hook("flowgrpo_jax", "beartype.beartype")


def pytest_configure(config):
    """What one test process has compiled, the others take from a folder of this run.

    Most of the time goes into compiling. The first process makes the folder; workers
    inherit its name.
    """
    if not hasattr(config, "workerinput"):
        config.compiled = tempfile.mkdtemp()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """A weights file of the tiny model."""
    from flowgrpo_jax.models import embedded
    from tests.tiny import tiny_model

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model, variables = tiny_model()
    embedded.save(path, variables, model)
    return str(path)
