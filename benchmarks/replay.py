"""Is a replayed sample what the run had? At random places of a run of the embedded model.

Command: python -m benchmarks.replay --folder=DIR [--places=10] [--seed=0]

The run is stopped after a part, and goes on on another mesh. What it had is kept as it
trains: images, states and log-probs of every iteration. Then samples at random places
are made again, each on the mesh that the run used and on one of the other size where a
checkpoint lies at the iteration, and compared bit for bit. The exit code is 1 if any
differs.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgrpo_jax import config as configs
from flowgrpo_jax import train
from flowgrpo_jax.assemble.replay import Place, replay
from flowgrpo_jax.engine.policy import PolicyStep
from flowgrpo_jax.engine.trajectory import Trajectory
from flowgrpo_jax.runtime import platform

PARTS = ((7, 2), (12, 1))  # iterations until a stop, devices
PROMPTS, GROUP, EVERY = 4, 4, 3
SHAPES, COLORS = ("circle", "square", "ring", "cross"), ("red", "green", "blue")
TEXTS = [f"a photo of a {color} {shape}" for shape in SHAPES for color in COLORS]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--places", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    platform.configure()
    workdir = Path(given.folder) / "run"
    had = trained(workdir)
    rng, equal, asked = np.random.default_rng(given.seed), 0, 0
    for _ in range(given.places):
        place = Place(
            int(rng.integers(PARTS[-1][0])),
            int(rng.integers(PROMPTS)),
            int(rng.integers(GROUP)),
        )
        meshes = [None]
        if not place.iteration % EVERY:
            other = 1 if place.iteration < PARTS[0][0] else 2
            meshes.append({"data": other})
        for mesh in meshes:
            one = replay(workdir, place, mesh=mesh, tell=lambda line: None)
            kept = had[place.iteration]
            same = is_same(one.sample, kept, place, GROUP) and not one.differs
            again = place.iteration - one.checkpoint
            print(
                f"{place}, mesh {mesh or 'of the run'}, {again} iterations again: "
                f"{'equal' if same else 'DIFFERS'}",
                flush=True,
            )
            equal, asked = equal + same, asked + 1
    print(f"{equal} of {asked} replays at {given.places} places equal")
    return 0 if equal == asked else 1


def trained(workdir: Path) -> dict:
    """Train in parts; what every iteration had."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    prompts = workdir.parent / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    had: dict = {}
    for iterations, devices in PARTS:
        config = configs.make(
            recipe="flow_grpo",
            prompts=str(prompts),
            eval__prompts=str(prompts),
            num_iterations=iterations,
            prompts_per_iteration=PROMPTS,
            updates_per_iteration=2,
            group_size=GROUP,
            microbatch=4,
            mesh={"data": devices},
            sample__num_steps=4,
            sample__eval_num_steps=2,
            eval__every=0,
            eval__images_per_task=1,
            eval__final_images_per_task=1,
            eval__sde=False,
            checkpoint__every=EVERY,
            checkpoint__keep=99,
            log__tensorboard=False,
            reward={"jpeg_compressibility": 1.0},
        )
        with recorded(had):
            train(config, workdir)
    return had


@contextlib.contextmanager
def recorded(had: dict[int, dict[str, Any]]) -> Iterator[None]:
    """What the iterations that are trained in it have goes into `had`, by iteration."""
    learn = PolicyStep.learn

    def kept(self, state, got):
        made = got.made.transitions
        had[got.iteration] = jax.device_get(
            {
                "images": np.concatenate(got.images),
                "numbers": np.concatenate(got.numbers),
                "latent": made.latent,
                "next": made.next_latent,
                "log_prob": made.log_prob,
                "rewards": dict(got.measured),
            }
        )
        return learn(self, state, got)

    PolicyStep.learn = kept
    try:
        yield
    finally:
        PolicyStep.learn = learn


def is_same(sample: Trajectory, had: dict[str, Any], place: Place, group: int) -> bool:
    """Picture, rewards, and the states and log-probs of the trained steps, to the bit.

    Of groups of so many images.
    """
    number = group * place.prompt + place.member
    image = had["images"][had["numbers"].tolist().index(number)]
    same = np.array_equal(sample.leaf.image, image)
    same &= all(
        sample.leaf.rewards[name] == values[number]
        for name, values in had["rewards"].items()
    )
    for step in sample.steps:
        if step.trained:
            found = (had["latent"] == step.latent).all(axis=(2, 3, 4))[..., None]
            found = found & (had["next"] == step.next_latent).all(axis=(3, 4, 5))
            same &= had["log_prob"][found].tolist() == [np.float32(step.log_prob)]
    return bool(same)


if __name__ == "__main__":
    sys.exit(main())
