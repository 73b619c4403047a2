#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file writes the memory of an array from its
# first element on, whatever its strides. A transposed or reversed view comes back as other
# numbers of the same shape; nothing is said. Guessed: the array, or an error, as for torch.
# Matters for: converting checkpoints between layouts ([in, out] and [out, in]). Fails if
# that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "safetensors==0.8.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, view in (
    ("transposed", kernel.T),
    ("every other column", kernel[:, ::2]),
    ("copied first", np.ascontiguousarray(kernel.T)),
):
    save_file({"w": view}, "w.safetensors")
    read = load_file("w.safetensors")["w"]
    print(f"{name}: wrote {view.tolist()}, read {read.tolist()}")
    assert read.shape == view.shape
    assert np.array_equal(read, view) == (name == "copied first")
PY
