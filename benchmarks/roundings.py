"""Which of XLA's operations round alike on two kinds of CPU?

    python benchmarks/roundings.py                        # here
    qemu-x86_64 -cpu max PYTHON benchmarks/roundings.py   # as on a CPU without AVX-512

A digest of the bits of each result, of inputs that are the same everywhere (qemu-user is
Debian's; it is slow: two minutes). Lines that differ are operations that two
machines round differently with the same versions. `XLA_FLAGS=--xla_cpu_max_isa=AVX2`
changes the code that XLA makes, and not the library that multiplies matrices for it.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

# Rows, inner dimension, columns: of the sizes that the embedded model multiplies.
PRODUCTS = ((128, 192, 192), (416, 192, 768), (416, 768, 192), (296, 128, 512))


def told(name: str, function, *inputs: np.ndarray) -> None:
    result = np.asarray(jax.jit(function)(*inputs))
    print(f"{name}: {hashlib.sha256(result.tobytes()).hexdigest()[:12]}", flush=True)


def main() -> None:
    rng = np.random.default_rng(0)
    for rows, inner, columns in PRODUCTS:
        left = rng.standard_normal((rows, inner)).astype(np.float32)
        right = rng.standard_normal((inner, columns)).astype(np.float32)
        told(f"{rows} x {inner} x {columns}", jnp.matmul, left, right)
    heads = rng.standard_normal((8, 4, 52, 48)).astype(np.float32)
    told(
        "attention scores",
        lambda one: jnp.einsum("bhqd,bhkd->bhqk", one, one),
        heads,
    )
    told("softmax of tanh", lambda one: jax.nn.softmax(jnp.tanh(one)), heads)


if __name__ == "__main__":
    main()
