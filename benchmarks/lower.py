"""Seconds to trace and lower the programs of the released sizes, on abstract weights.

    taskset -c 0 python -m benchmarks.lower [--model=NAME] [--fsdp=N]

N devices that share the parameters, 1 by default; 48 prompts of 24 images, guidance,
KL. Every time begins with empty caches.
CPU seconds of the process beside those of the wall: a shared machine stretches the
second. The least of the repeats.
"""

import argparse
import time

import jax

from flowgrpo_jax import assemble
from flowgrpo_jax import config as configs
from flowgrpo_jax.runtime import mesh as meshes

REPEATS = 3
RUNS = [
    ("sd3.5-medium", {"train__use_lora": True}),
    ("sd3.5-medium", {"train__use_lora": False}),
    ("sd3.5-large", {"train__use_lora": True}),
    ("sd3.5-large", {"train__use_lora": False}),
    ("flux.1-dev", {"train__use_lora": True}),
    ("flux.1-dev", {"train__use_lora": False}),
]


def main() -> None:
    print(f"jax {jax.__version__}; least of {REPEATS}: CPU s, wall s")
    print("| model | learns | program | CPU | wall |\n|---|---|---|---|---|")
    names = sorted({name for name, _ in RUNS})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=names, action="append")
    parser.add_argument("--fsdp", type=int, default=1)
    given = parser.parse_args()
    chosen = given.model or names
    jax.config.update("jax_num_cpu_devices", given.fsdp)
    mesh = meshes.make_mesh({"data": 1, "fsdp": given.fsdp})
    for name, values in RUNS:
        if name not in chosen:
            continue
        config = configs.make(f"model={name}", microbatch=4, remat="full", **values)
        work = assemble.make_work(config, mesh, *assemble.abstract_model(config))
        arguments = work.arguments()
        for program in ("rollout", "update"):
            times = [
                lowering(getattr(work, program), arguments[program])
                for _ in range(REPEATS)
            ]
            cpu, wall = (min(column) for column in zip(*times, strict=True))
            learns = "LoRA" if config.train.use_lora else "all"
            print(
                f"| {name} | {learns} | {program} | {cpu:.1f} | {wall:.1f} |",
                flush=True,
            )


def lowering(program, arguments) -> tuple[float, float]:
    """(CPU, wall) seconds of one trace and lowering from scratch."""
    jax.clear_caches()
    cpu, wall = time.process_time(), time.perf_counter()
    program.lower(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
