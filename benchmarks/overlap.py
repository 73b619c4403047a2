"""What a slow host reward costs an iteration that samples meanwhile.

    python benchmarks/overlap.py

The embedded world, once with its own reward and once with one beside it that sleeps
`--seconds` for the images of an iteration (its share of them for those of a batch).
Iterations take turns, so that a busy machine slows both alike; medians are printed.
"""

import argparse
import json
import time

import numpy as np

from flowgrpo_jax import config as configs
from flowgrpo_jax.assemble import run as assembled
from flowgrpo_jax.config import checks
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.runtime import metric_names


class Sleepy:
    """Zero for every image, after a while."""

    def __init__(self, context, seconds, images):
        self._each = seconds / images

    def __call__(self, images, prompts):
        time.sleep(self._each * len(images))
        return {"sleepy": np.zeros(len(images))}


def make_run(flags, rewards):
    images = flags.prompts * flags.group
    config = configs.make(
        recipe="flow_grpo",
        prompts_per_iteration=flags.prompts,
        group_size=flags.group,
        reward=dict.fromkeys(rewards, 0.0) | {"geneval": 1.0},
        reward_options={"sleepy": {"seconds": flags.seconds, "images": images}},
        reward_batches=flags.batches,
        sample__guidance_scale=1.0,
        eval__guidance_scale=1.0,
    )
    checks.check(config)
    return assembled.Run(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=2.0)
    add("--prompts", type=int, default=96)
    add("--group", type=int, default=16)
    add("--batches", type=int, default=8)
    add("--iterations", type=int, default=3)
    flags = parser.parse_args()
    registry.REWARDS["sleepy"] = Sleepy
    runs = {"without": make_run(flags, ()), "with": make_run(flags, ("sleepy",))}
    states = {name: run.initial_state() for name, run in runs.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    for iteration in range(flags.iterations + 1):
        for name, run in runs.items():
            begin = time.monotonic()
            states[name], metrics = run.step(states[name], iteration)
            times = [
                metrics[part] for part in (metric_names.ROLLOUT, metric_names.REWARD)
            ]
            if iteration:  # the first one compiles
                seconds[name].append([time.monotonic() - begin, *times])
    medians = {name: np.median(rows, axis=0) for name, rows in seconds.items()}
    columns = ("iteration", "rollout", "waiting for rewards")
    for name, values in medians.items():
        print(name, dict(zip(columns, np.round(values, 2).tolist(), strict=True)))
    ratio = medians["with"][0] / medians["without"][0]
    print(json.dumps({"ratio": round(float(ratio), 3)} | vars(flags)))


if __name__ == "__main__":
    main()
