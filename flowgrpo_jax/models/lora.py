"""Folding a LoRA into the kernels that it adapts, for export.

Never for training: a rollout with folded weights does not give the log-probs that an
update with separate ones gives (see `layers.Dense`).
"""

from typing import Any

import numpy as np
from flax import traverse_util

from flowgrpo_jax.models.flow_model import Variables


def fold(variables: Variables, alpha: float) -> Variables:
    """Host variables without `lora`, whose kernels carry its change."""
    if "lora" not in variables:
        return variables
    kernels = traverse_util.flatten_dict(variables["transformer"])
    factors = traverse_util.flatten_dict(variables["lora"])
    for path in {path[:-1] for path in factors}:
        change = _change(factors[(*path, "a")], factors[(*path, "b")], alpha)
        kernel = kernels[(*path, "kernel")]
        kernels[(*path, "kernel")] = kernel + change.reshape(kernel.shape)
    rest = {name: tree for name, tree in variables.items() if name != "lora"}
    return rest | {"transformer": traverse_util.unflatten_dict(kernels)}


def _change(a: Any, b: Any, alpha: float) -> np.ndarray:
    """A @ B * alpha / rank of all parts side by side: [..., in, part, out / part]."""
    rank = a.shape[-1]
    return np.einsum("...pir,...pro->...ipo", a, b) * (alpha / rank)
