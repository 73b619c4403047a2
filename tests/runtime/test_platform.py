"""Which library multiplies matrices on a CPU; libtpu where no TPU is."""

import os

import jax
import jax.numpy as jnp
import pytest

from flowgrpo_jax.runtime import mesh as meshes
from flowgrpo_jax.runtime import platform


def compiled(options):
    """The program of a matrix product in bf16."""
    x, kernel = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((32, 96), jnp.bfloat16)
    product = jax.jit(lambda x, kernel: x @ kernel, compiler_options=options)
    return product.lower(x, kernel).compile().as_text()


def test_no_product_of_bf16_goes_to_another_library():
    """Oracle: the compiled program, beside the one of XLA's own choice."""
    options = platform.one_library(meshes.make_mesh({"data": 1}), jnp.bfloat16)
    if "__ynn_fusion" not in compiled(None):
        pytest.skip("XLA gives no product to another library on this machine")
    assert "__ynn_fusion" not in compiled(options)


def test_other_programs_are_compiled_as_ever():
    """Oracle: the contract; nothing is said of fp32, nor where there are no CPUs."""
    mesh = meshes.make_mesh({"data": 1})
    assert platform.one_library(mesh, jnp.float32) is None
    assert platform.one_library(mesh, None) is None
    abstract = meshes.make_abstract_mesh({"data": 8}, 8)
    assert platform.one_library(abstract, jnp.bfloat16) is None


@pytest.mark.parametrize("chip", [None, "accel0", "vfio"])
def test_libtpu_is_told_what_it_would_ask_where_no_tpu_is(chip, monkeypatch, tmp_path):
    """Oracle: the contract; a machine with chips, and what a user has set, stay."""
    names = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    for name in names:
        monkeypatch.setenv(name, "x")  # so that it is taken back after the test
        monkeypatch.delenv(name)
    if chip:
        (tmp_path / chip).touch()
    platform.quiet_libtpu(tmp_path)
    assert [name in os.environ for name in names] == [chip is None] * 2
    monkeypatch.setenv(names[1], "mine")
    platform.quiet_libtpu(tmp_path)
    assert os.environ[names[1]] == "mine"


def test_a_home_that_cannot_be_written_to_has_no_cache(monkeypatch, tmp_path):
    """Oracle: the option of jax, which would warn at every program."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        platform.configure(tmp_path / "file" / "xla")
        assert jax.config.jax_compilation_cache_dir is None
        platform.configure(tmp_path / "xla")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_of_compiled_programs_that_the_user_names_stays(monkeypatch):
    """Oracle: the option of jax, which has read the variable when it was imported."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/there")
    before = jax.config.jax_compilation_cache_dir
    platform.configure()
    assert jax.config.jax_compilation_cache_dir == before
