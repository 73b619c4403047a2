"""Learning rate against clip range: how far an update goes, and what holds it.

Command: python -m launch.local --config=configs/geneval.py \\
  --sweep=launch/sweeps/learning_rate_clip.py
"""


def sweep(hyper):
    return hyper.product(
        [
            hyper.sweep("config.train.learning_rate", [3e-5, 1e-4, 3e-4]),
            hyper.sweep("config.train.clip_range", [1e-5, 1e-4, 1e-3]),
        ]
    )
