"""The back ends by name: python -m launch local --config=... --sweep=..."""

import runpy
import sys

from flowgrpo_jax.errors import not_one_of

BACK_ENDS = ("local", "xm", "slurm", "tpu_vm", "gke", "sky")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in (*BACK_ENDS, "table"):
        line = not_one_of(
            "back end", name, BACK_ENDS, "; or table, for what came of it"
        )
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
