"""Train: `python -m flowgrpo_jax.main --config=configs/geneval.py`."""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from flowgrpo_jax import cli
from flowgrpo_jax.config import recipes
from flowgrpo_jax.config.listing import listing
from flowgrpo_jax.runtime import stopping

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the run: FILE.py or FILE.py:recipe=NAME.", FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of all that the run writes; by default runs/<config>. The same command "
    "resumes a run there.",
    FLAGS,
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Where the config's base model is on this machine, if it has been moved.",
    FLAGS,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for a run on several hosts whose cluster does not tell it.",
    FLAGS,
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes the run has.", 1, 100_000, FLAGS
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", 0, 99_999, FLAGS
)
_LIST = flags.DEFINE_bool(
    "list_recipes", False, "Print a table of the algorithms and exit.", FLAGS
)
_PRINT = flags.DEFINE_bool(
    "print_config",
    False,
    "Print the final config, first what differs from the defaults, and exit.",
    FLAGS,
)


def main() -> int:
    if _LIST.value:
        print(recipes.describe())
        return 0
    config = cli.required_config(_CONFIG)
    if _PRINT.value:
        print(listing(config))
        return 0
    workdir = cli.workdir(_WORKDIR.value, FLAGS["config"])
    from flowgrpo_jax.assemble import base_weights
    from flowgrpo_jax.runtime import cluster
    from flowgrpo_jax.train import train

    command = shlex.join(["python", "-m", "flowgrpo_jax.main", *sys.argv[1:]])
    address = cluster.given(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    with cluster.joined(address):
        config = base_weights.at(config, _MODEL.value)
        return 0 if train(config, workdir, command) else stopping.status()


if __name__ == "__main__":
    cli.run(main, FLAGS)
