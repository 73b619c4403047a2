#!/usr/bin/env bash
# optax 0.2.8: clip_by_global_norm adds up the squares in the type of the gradients. In
# float16 the norm of ordinary gradients overflows to inf, and the clipped gradients are
# exact zeros: no NaN, no error, no learning. One infinite entry does the same to all
# others in any type. Guessed: the norm in float32, or a NaN that is noticed. Matters for:
# training that keeps gradients in half precision. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "optax==0.2.8" "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)


def clipped(gradients):
    return np.asarray(clip.update({"w": gradients}, clip.init(None))[0]["w"])


half = clipped(jnp.full((4,), 400.0, jnp.float16))
single = clipped(jnp.full((4,), 400.0, jnp.float32))
infinite = clipped(jnp.array([jnp.inf, 1.0, 2.0], jnp.float32))
print("float16, four entries of 400:", half)
print("float32, the same:", single)
print("float32, one infinite entry beside 1 and 2:", infinite)
assert (half == 0).all()
np.testing.assert_allclose(single, 0.5, rtol=1e-6)
assert (infinite[1:] == 0).all()
PY
