"""Feed every surface with drawn inputs and print what became of them.

    python -m benchmarks.fuzz --inputs=25000            # all, a table
    python -m benchmarks.fuzz --surface=configs --inputs=1000

The exit code is 1 if one input ended in a traceback, a hang or a wrong acceptance; the
smallest input of every such kind is printed. Needs hypothesis (extra `test`); where
atheris is installed, a surface of bytes gets as many inputs by mutation.
"""

import argparse
import importlib
import importlib.util
import sys

from benchmarks.fuzz import core

# A file of this folder each, with a function `surface`.
SURFACES = (
    "configs",
    "prompt_files",
    "tensor_files",
    "model_json",
    "reward_returns",
    "server_requests",
    "server_answers",
    "checkpoints",
    "workdirs",
)


def surface_of(name: str) -> core.Surface:
    return importlib.import_module(f"benchmarks.fuzz.{name}").surface()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--surface", choices=SURFACES, action="append")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    bad = 0
    print(core.HEAD, flush=True)
    for name in chosen.surface or SURFACES:
        surface, tally = surface_of(name), core.Tally()
        core.run(surface, chosen.inputs, chosen.seed, tally)
        if surface.check_bytes and importlib.util.find_spec("atheris"):
            core.run_bytes(name, chosen.inputs, chosen.seed, tally)
        print(tally.row(name), flush=True)
        bad += tally.bad
        for kind, (given, told) in tally.examples.items():
            print(f"--- {kind}\n{given}\n{told}", file=sys.stderr, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
