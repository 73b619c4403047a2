"""The names of metrics: made here and read back here, and nowhere else.

A name is a column and what is measured in it. Rows of training, and the scores of a
protocol, have no column. Rows of evaluation have one for each way to make images:

    eval_reward_pickscore            guided, as the model is used
    eval_unguided_counting_accuracy  without guidance
    eval_sde_reward_avg              by the stochastic sampler of training

`reward_<name>` is the mean of a reward over images, `<task>_accuracy` the score of a
task, and anything else is a monitor. All that depends on the clock or the machine is
`time/<name>`. Names may have underscores: what is made here is read back unchanged.
"""

import re
from dataclasses import dataclass
from typing import Literal

PLAIN = ""
GUIDED = "eval_"
UNGUIDED = "eval_unguided_"
STOCHASTIC = "eval_sde_"

Kind = Literal["reward", "accuracy", "monitor"]

OVERALL = "overall"  # the task that stands for all: GenEval's mean over the tasks
AVERAGE = "avg"  # the reward that stands for all: the weighted sum

_REWARD = "reward_"
_ACCURACY = "_accuracy"
# A task of such a name would be read as something else, or as another task.
_AMBIGUOUS = re.compile("(reward|eval|unguided|sde)?(_|$)")


@dataclass(frozen=True)
class Metric:
    """A name, read: its column, what kind of measurement it is, and of what."""

    column: str
    kind: Kind
    name: str


def reward(name: str, column: str = PLAIN) -> str:
    """The mean of a reward over the images of a column."""
    return f"{column}{_REWARD}{name}"


def deviation(name: str, column: str = PLAIN) -> str:
    """The standard deviation of a held-out reward over images, beside its mean."""
    return f"{reward(name, column)}_std"


def accuracy(task: str, column: str = GUIDED) -> str:
    """The score of a task. A task called like a column or a reward gets a `_` first."""
    mark = "_" if _AMBIGUOUS.match(task) else ""
    return f"{column}{mark}{task}{_ACCURACY}"


def monitor(name: str, column: str = GUIDED) -> str:
    """A measurement that is neither a reward nor an accuracy."""
    return f"{column}{name}"


def time(name: str) -> str:
    """What depends on the clock or the machine: left out when runs are compared."""
    return f"time/{name}"


def host(process: int) -> str:
    """Seconds of an iteration until a process had the rewards of its images."""
    return time(f"host_{process}")


def is_time(metric: str) -> bool:
    return metric.startswith("time/")


def parse(metric: str) -> Metric:
    """What `reward`, `accuracy` or `monitor` were called with, from what they made."""
    columns = (UNGUIDED, STOCHASTIC, GUIDED, PLAIN)
    column = next(one for one in columns if metric.startswith(one))
    rest = metric.removeprefix(column)
    if rest.startswith(_REWARD):
        return Metric(column, "reward", rest.removeprefix(_REWARD))
    if rest.endswith(_ACCURACY):
        task = rest.removesuffix(_ACCURACY)
        return Metric(column, "accuracy", task.removeprefix("_"))
    return Metric(column, "monitor", rest)


REWARD_AVERAGE = reward(AVERAGE)
GAP = monitor("gap", STOCHASTIC)  # its reward less that of the deterministic column
MONITORS_WORSE = monitor("monitors_worse")  # how many, see rewards/monitors.py
WALL = time("wall")  # seconds of the run so far
PROCESS = time("process")  # how many times the run was started so far
PEAK_MEMORY = time("peak_memory_gb")
IMAGES_PER_SECOND = time("images_per_second")
EVALUATION = time("evaluation")
# What an iteration of policy training consists of, in seconds.
ROLLOUT, REWARD, UPDATE = PHASES = time("rollout"), time("reward"), time("update")
