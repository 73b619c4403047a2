"""Noise level against the stochastic window: how much is explored, and over which steps.

For a recipe with a window, such as the default of configs/geneval.py.
Command: python -m launch.local --config=configs/geneval.py \\
  --sweep=launch/sweeps/noise_window.py
"""


def sweep(hyper):
    return hyper.product(
        [
            hyper.sweep("config.sample.noise_level", [0.5, 0.7, 0.9]),
            hyper.sweep("config.sample.sde_window_size", [1, 2, 3]),
        ]
    )
