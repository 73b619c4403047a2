"""Finished runs side by side: scores and monitors before and after.

Command: python benchmarks/table.py runs/seed42 runs/seed43 runs/seed44
"""

import statistics
import sys
from pathlib import Path

from flowgrpo_jax.runtime import metric_names
from flowgrpo_jax.runtime.metrics import read_metrics

ROWS = {
    "guided overall": metric_names.accuracy(metric_names.OVERALL),
    "unguided overall": metric_names.accuracy(
        metric_names.OVERALL, metric_names.UNGUIDED
    ),
    "exact count": metric_names.reward("exact_count", metric_names.GUIDED),
    "objects per image": metric_names.monitor("objects"),
    "unknown objects": metric_names.monitor("unknown"),
    "background energy": metric_names.monitor("background_energy"),
    "background texture": metric_names.monitor("background_texture"),
    "colour entropy (bits)": metric_names.monitor("color_entropy"),
    "diversity in a prompt": metric_names.monitor("diversity"),
    "minutes of training": (MINUTES := "minutes"),
}


def minutes(rows: list[dict]) -> float:
    """Wall clock of all iterations, without set-up and evaluation."""
    train = [row for row in rows if row["kind"] == "train"]
    return sum(row[phase] for row in train for phase in metric_names.PHASES) / 60


def main(folders: list[str]) -> None:
    """Print a markdown table; mean and standard deviation when there are several."""
    runs = {}
    for folder in folders:
        rows = read_metrics(folder)
        evals = [row for row in rows if row["kind"] == "eval"]
        runs[Path(folder).name] = (evals[0], evals[-1] | {MINUTES: minutes(rows)})
    names = [*runs, *(["mean", "std"] if len(runs) > 1 else [])]
    print("| | before | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for label, key in ROWS.items():
        before = statistics.mean(first.get(key, 0.0) for first, _ in runs.values())
        after = [last[key] for _, last in runs.values()]
        cells = [before, *after]
        if len(after) > 1:
            cells += [statistics.mean(after), statistics.stdev(after)]
        print(f"| {label} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
