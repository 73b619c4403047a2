"""Algorithms beside each other on the same seeds, each with its own hyperparameters.

Command: python -m launch.local --config=configs/geneval.py \\
  --sweep=launch/sweeps/recipes.py -- --config.num_iterations=100

Iterations of these rows do not cost the same: arena.py beside this file has all rows at
equal network evaluations.
"""

RECIPES = ("flow_grpo", "flow_grpo_fast", "g2rpo", "mix_grpo", "diffusion_nft", "awm")


def sweep(hyper):
    return hyper.product(
        [
            hyper.sweep("config:recipe", RECIPES),
            hyper.sweep("config.seed", [42, 43, 44]),
        ]
    )
