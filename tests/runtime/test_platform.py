"""Which library multiplies matrices on a CPU."""

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
