"""Lines of code that each algorithm needs beyond what others share.

Command: python benchmarks/lines.py
A line of the table is the row in recipes.py and, by name, what was written for that
algorithm alone or for it first (others then use it for nothing). Docstrings count.
"""

import inspect
import re
from collections.abc import Callable
from types import ModuleType

from flowgrpo_jax.config import recipes
from flowgrpo_jax.flow import plan, transition
from flowgrpo_jax.rl.objectives.table import OBJECTIVES
from flowgrpo_jax.rl.step_weight import tempflow_weights


def _room(objective: str) -> ModuleType:
    """The whole room: the function, its options and what it imports."""
    module = inspect.getmodule(OBJECTIVES[objective].score)
    assert module is not None
    return module


PIECES: dict[str, list[Callable | ModuleType]] = {
    "flow_grpo": [plan.chains, transition._flow_sde, _room("ppo_clip")],
    "flow_grpo_fast": [plan.random_window],
    "g2rpo": [plan.branches],
    "dance_grpo": [plan.random_subset, transition._dance],
    "mix_grpo": [plan.progressive_window],
    "mix_grpo_flash": [plan.compressed, transition.dpm_solver_2m],
    "tempflow_grpo": [tempflow_weights],
    "branch_grpo": [plan.tree],
    "dense_grpo": [plan._probe],
    "flow_cps": [transition._cps],
    "grpo_guard": [_room("guard")],
    "flow_dppo": [_room("dppo")],
    "diffusion_nft": [_room("nft")],
    "awm": [_room("awm")],
    "dgpo": [_room("dgpo")],
    "crd": [_room("crd")],
    "orw_cfm_w2": [_room("weighted_matching")],
    "online_dpo": [_room("dpo")],
}


def row_lines() -> dict[str, int]:
    """Lines of every row of the table, as it stands in the file."""
    source = inspect.getsource(recipes).splitlines()
    starts = [(n, found[1]) for n, line in enumerate(source)
              if (found := re.match(r'    "(\w+)": Recipe\(', line))]  # fmt: skip
    ends = [n for n, line in enumerate(source) if line == "    ),"]
    return {name: next(e for e in ends if e > n) - n + 1 for n, name in starts}


def main() -> None:
    """Print the table in markdown."""
    print("| recipe | row | written for it |")
    print("|---|---|---|")
    for name, count in row_lines().items():
        pieces = [
            f"`{piece.__name__.split('.')[-1]}` {len(inspect.getsource(piece).splitlines())}"
            for piece in PIECES.get(name, [])
        ]
        print(f"| {name} | {count} | {', '.join(pieces) or 'nothing'} |")


if __name__ == "__main__":
    main()
