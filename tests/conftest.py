"""Shapes and types of the package are checked while the tests run."""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Most of the time goes into compiling: what one test process has compiled, the others
# take from it. The first process makes the folder and the workers inherit its name.
_OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from jaxtyping import install_import_hook

install_import_hook("flowgrpo_jax", "beartype.beartype")


def pytest_unconfigure():
    if _OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """A weights file of the tiny model."""
    from flowgrpo_jax.sprites import model as sprites_model
    from tests.tiny import tiny_model

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model, variables = tiny_model()
    sprites_model.save(path, variables, model)
    return str(path)
