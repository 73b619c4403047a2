"""The weight of the KL to the reference, from none to ten times the paper's.

Command: python -m launch.local --config=configs/geneval.py --sweep=launch/sweeps/kl.py
"""


def sweep(hyper):
    return hyper.product(
        [
            hyper.sweep("config.train.beta", [0.0, 0.004, 0.04, 0.4]),
            hyper.sweep("config.seed", [42, 43, 44]),
        ]
    )
