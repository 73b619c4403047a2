"""Gradient noise of G2RPO and Flow-GRPO on a flow of two numbers, at equal images.

Command: python -m benchmarks.toy
Both rate 192 images of one prompt an iteration. The
gradient is read from Adam's first moment after one update of the untouched policy.
"""

import operator

import numpy as np
import optax
from absl import app, flags

from tests import toy

_DRAWS = flags.DEFINE_integer("draws", 200, "Gradients per recipe.")


class _Patch:
    """What pytest's monkeypatch does, for good."""

    setattr = staticmethod(setattr)
    setitem = staticmethod(operator.setitem)


def gradients(recipe: str, **values) -> np.ndarray:
    """So many gradients [draw, 2] of the same policy, up to a constant factor."""
    run = toy.make_run(
        _Patch,
        recipe,
        prompts_per_iteration=1,
        updates_per_iteration=1,
        microbatch=32,
        train__max_grad_norm=1e9,
        train__learning_rate=0.0,
        **values,
    )
    found = []
    for iteration in range(_DRAWS.value):
        state, _ = run.step(run.initial_state(), iteration)
        moments = optax.tree_utils.tree_get(state.optimizer, "mu")
        found.append(np.asarray(moments["transformer"]["mean"]))
    return np.stack(found)


def main(_):
    cases = {
        "g2rpo_released (12 x 8 x 2)": gradients(
            "g2rpo_released", train__update_order="chunks"
        ),
        "flow_grpo (192, group std)": gradients(
            "flow_grpo",
            group_size=192,
            sample__num_steps=16,
            sample__schedule="shifted",
            sample__init_noise="shared",
            train__advantage_std="group",
            train__beta=0.0,
        ),
    }
    print("| recipe | noise / signal of the gradient |")
    print("|---|---|")
    for name, found in cases.items():
        signal = np.linalg.norm(found.mean(0))
        noise = np.sqrt(found.var(0, ddof=1).sum())
        print(f"| {name} | {noise / signal:.2f} |")


if __name__ == "__main__":
    app.run(main)
