"""Finished runs side by side: scores and monitors before and after.

Command: python benchmarks/table.py runs/seed42 runs/seed43 runs/seed44
"""

import statistics
import sys
from pathlib import Path

from flowgrpo_jax.runtime.metrics import read_metrics

ROWS = {
    "guided overall": "eval_overall_accuracy",
    "unguided overall": "eval_unguided_overall_accuracy",
    "exact count": "eval_reward_exact_count",
    "objects per image": "eval_objects",
    "unknown objects": "eval_unknown",
    "background energy": "eval_background_energy",
    "background texture": "eval_background_texture",
    "colour entropy (bits)": "eval_color_entropy",
    "diversity in a prompt": "eval_diversity",
    "minutes of training": (MINUTES := "minutes"),
}
PHASES = ("time/rollout", "time/reward", "time/update")


def minutes(rows: list[dict]) -> float:
    """Wall clock of all iterations, without set-up and evaluation."""
    train = [row for row in rows if row["kind"] == "train"]
    return sum(row[phase] for row in train for phase in PHASES) / 60


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
