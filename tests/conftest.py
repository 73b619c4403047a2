"""Shapes and types of the package are checked while the tests run."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook("flowgrpo_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """A weights file of the tiny model."""
    from flowgrpo_jax.sprites import model as sprites_model
    from tests.tiny import tiny_model

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model, variables = tiny_model()
    sprites_model.save(path, variables, model)
    return str(path)
