#!/usr/bin/env bash
# jax 0.10.2: jax.random.normal(key, shape, bfloat16) draws only 128 different values, none
# beyond -2.89 and 2.52, with a mean of -0.012: it is not a rounded float32 normal.
# Matters for: first noises and SDE noise of diffusion samplers that draw in the type of
# their network. Guessed: the float32 draw, cast. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

key = jax.random.key(0)
drawn = np.asarray(jax.random.normal(key, (1_000_000,), jnp.bfloat16), np.float32)
cast = np.asarray(jax.random.normal(key, (1_000_000,)).astype(jnp.bfloat16), np.float32)
for name, values in (("bfloat16 draw", drawn), ("float32 draw, cast", cast)):
    print(
        f"{name}: {len(np.unique(values))} values, from {values.min():.2f} to "
        f"{values.max():.2f}, mean {values.mean():+.4f}"
    )
assert len(np.unique(drawn)) == 128
assert drawn.min() > -2.9 and drawn.max() < 2.6
assert abs(drawn.mean()) > 0.01  # a million draws: ten standard errors
assert len(np.unique(cast)) > 1000 and cast.max() > 4
PY
