"""Train: `python -m flowgrpo_jax.main --config=configs/geneval.py`."""

from absl import flags
from ml_collections import config_flags

from flowgrpo_jax import commands, recipes

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything goes; default runs/<config>. Rerun to resume."
)
_LIST = flags.DEFINE_bool("list_recipes", False, "Print the algorithms and stop.")


def main(_) -> int:
    if _LIST.value:
        print(recipes.describe())
        return 0
    config = commands.required_config(_CONFIG)
    workdir = commands.workdir(_WORKDIR.value, _CONFIG)
    from flowgrpo_jax.train import train

    finished = train(config, workdir)
    return 0 if finished else commands.STOPPED


if __name__ == "__main__":
    commands.run(main)
