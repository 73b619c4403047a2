"""Attack the package and write what came of it to docs/reliability.md.

    python -m benchmarks.attacks                  # all; writes the table
    python -m benchmarks.attacks --only=prompts   # one file of this folder; prints

The exit code is 1 if one answer was not right.
"""

import argparse
import sys

from benchmarks import sections
from benchmarks.attacks import answers, pages, prompts, requests, signals, workdirs
from benchmarks.attacks.table import HEAD

GROUPS = {
    "signals": signals,
    "workdirs": workdirs,
    "requests": requests,
    "answers": answers,
    "prompts": prompts,
    "pages": pages,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=GROUPS)
    only = parser.parse_args().only
    rows = []
    print(HEAD, flush=True)
    for name in [only] if only else GROUPS:
        for row in GROUPS[name].rows():
            print(row, flush=True)
            rows.append(row)
    if not only:
        table = "\n".join([HEAD, *map(str, rows)])
        sections.write("Attacks", "python -m benchmarks.attacks", table)
    return 0 if all(row.tries == row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
