"""What came of a sweep, in any state: a table of text and one page.

python -m launch.table ROOT/XID                 the score is that of the last evaluation
python -m launch.table ROOT/XID --metric=eval_reward_pickscore

Units that differ only in their seed stand together, by their mean. The page is
ROOT/XID/sweep.html.
"""

from collections.abc import Sequence

from absl import flags

from flowgrpo_jax.errors import UserError
from launch import command, live, page, results, states, sweep_dir, units
from launch.results import Table, number
from launch.sweep_dir import SweepDir

FLAGS = flags.FlagValues()
_METRIC = flags.DEFINE_string(
    "metric",
    None,
    "What units are compared by: a name in their metrics.jsonl; by default the overall "
    "accuracy, or else the average reward, of the last evaluation.",
    FLAGS,
)
_LONGEST = 100  # characters of a last line in the table of text


def text(made: Table) -> str:
    """The table as text: groups with mean and spread, their units, and last lines."""
    names = units.short(made.keys)
    head = (*names.values(), "mean", "std", "unit", "state", "iteration", "score", "")
    rows: list[Sequence[str]] = [head]
    for group in made.groups:
        first: tuple[str, ...] = (
            *group.values,
            number(group.mean),
            number(group.spread),
        )
        for one in group.members:
            cells = (
                one.unit.name,
                one.word,
                live.progress(one),
                number(one.score(made.metric)),
                one.last_line[:_LONGEST],
            )
            rows.append((*first, *cells))
            first = ("",) * len(first)
    return "\n".join([f"score: {made.metric}", *live.aligned(rows)])


def tell(sweep: SweepDir, metric: str | None = None) -> bool:
    """Print the table, write the page; whether a unit is not finished."""
    made = results.of(states.of(sweep), metric)
    print(text(made))
    print(f"page: {page.write(sweep, made)}")
    return not all(one.is_done for one in made.states)


def main(places: list[str]) -> None:
    if len(places) != 1:
        raise UserError(
            "launch.table: give one ROOT/XID, as a launcher prints it: "
            "python -m launch.table runs/1"
        )
    tell(sweep_dir.read(places[0]), _METRIC.value)


if __name__ == "__main__":
    command.run(main, FLAGS, named=True)
