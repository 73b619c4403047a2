"""Names of metrics: what is made is read back; the names that runs have written."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgrpo_jax.runtime import metric_names as names

COLUMNS = (names.PLAIN, names.GUIDED, names.UNGUIDED, names.STOCHASTIC)
EVALUATION = COLUMNS[1:]
# Texts with many underscores, and with the words that names themselves are made of.
WORDS = st.sampled_from(
    ["reward", "accuracy", "unguided", "sde", "eval", "time/", "overall", "a", "", "_"]
)
TEXTS = st.lists(WORDS, max_size=5).map("_".join) | st.text(max_size=8)


@given(TEXTS, st.sampled_from(COLUMNS))
def test_rewards_are_read_back(name, column):
    """Oracle: a round trip."""
    made = names.reward(name, column)
    assert names.parse(made) == names.Metric(column, "reward", name)


@given(TEXTS, st.sampled_from(COLUMNS))
def test_tasks_are_read_back(task, column):
    """Oracle: a round trip."""
    made = names.accuracy(task, column)
    assert names.parse(made) == names.Metric(column, "accuracy", task)


@given(TEXTS, TEXTS, st.sampled_from(COLUMNS), st.sampled_from(COLUMNS))
def test_no_two_scores_have_one_name(first, second, column, other):
    """Oracle: an invariance; a reward is no task, and a column no other."""
    made = [names.reward(first, column), names.accuracy(second, other)]
    assert len(set(made)) == 2
    if (first, column) != (second, other):
        assert names.accuracy(first, column) != names.accuracy(second, other)


@pytest.mark.parametrize(
    ("made", "written"),
    [
        (names.reward("avg"), "reward_avg"),
        (names.reward("pick_score", names.GUIDED), "eval_reward_pick_score"),
        (names.accuracy("color_attr"), "eval_color_attr_accuracy"),
        (
            names.accuracy("overall", names.UNGUIDED),
            "eval_unguided_overall_accuracy",
        ),
        (names.reward("avg", names.STOCHASTIC), "eval_sde_reward_avg"),
        (names.GAP, "eval_sde_gap"),
        (names.monitor("diversity"), "eval_diversity"),
        (names.IMAGES_PER_SECOND, "time/images_per_second"),
    ],
)
def test_the_names_that_runs_have_written(made, written):
    """Oracle: by hand, from the rows of earlier runs."""
    assert made == written


def test_monitors_are_read_back():
    """Oracle: by hand, one of each column."""
    for column in EVALUATION:
        made = names.monitor("clip_diversity", column)
        assert names.parse(made) == names.Metric(column, "monitor", "clip_diversity")


def test_names_are_made_in_one_file():
    """Oracle: the texts of all other files; no part of a name stands there."""
    root = Path(__file__).parents[2]
    keys = "eval_(every|freq|num_steps|steps)"  # of configs, as other tools name them
    part = re.compile(
        f"""["'](?!{keys})(eval_|reward_avg|reward_{{|time/)|[}}"']_accuracy["']"""
    )
    for folder in ("flowgrpo_jax", "benchmarks", "examples"):
        for file in (root / folder).rglob("*.py"):
            if file.name != "metric_names.py":
                lines = file.read_text().splitlines()
                assert not [line for line in lines if part.search(line)], file
