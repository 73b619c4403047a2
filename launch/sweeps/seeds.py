"""Three seeds of one run: mean and spread of whatever is told of it.

Command: python -m launch.local --config=configs/geneval.py --sweep=launch/sweeps/seeds.py
"""


def sweep(hyper):
    return hyper.sweep("config.seed", [42, 43, 44])
