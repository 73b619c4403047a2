"""A config as text."""

from flowgrpo_jax import config as configs
from flowgrpo_jax.config.listing import listing


def test_what_differs_comes_first_with_its_default():
    """Oracle: the lines, by hand."""
    config = configs.make(seed=7, train__learning_rate=1e-4)
    config.reward.geneval = 0.5
    lines = listing(config).splitlines()
    assert lines[:4] == [
        "# 3 differ from the defaults",
        "reward = {'geneval': 0.5}  (default {'geneval': 1.0})",
        "seed = 7  (default 42)",
        "train.learning_rate = 0.0001  (default 0.0003)",
    ]
    assert lines[4].startswith("# ") and lines[4].endswith(" are as by default")
    assert "sample.sde_window_range = (0, 5)" in lines[5:]


def test_every_key_has_one_line():
    """Oracle: the keys of the config itself; a group of the user's names is one."""
    text = listing(configs.make())
    keys = [line.split(" = ")[0] for line in text.splitlines() if line[0] != "#"]
    assert len(keys) == len(set(keys))
    wanted = set()
    for name, value in configs.base().to_dict().items():
        if isinstance(value, dict) and name not in configs.OPEN:
            wanted |= {f"{name}.{inner}" for inner in value}
        else:
            wanted.add(name)
    assert set(keys) == wanted
