"""Verdicts on runs that are known: each is made of rows that show one thing."""

import math

import numpy as np
import pytest

from flowgrpo_jax.report.verdicts import verdicts

CONFIG = {
    "num_iterations": 1000,
    "reward": {"mine": 1.0},
    "eval": {"monitor_threshold": 0.2, "reward": {}},
}


def run(count=200, train=None, evals=None, every=50, last=False):
    """Rows of `count` iterations; `train` and `evals`: iteration -> what is different."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count + last):
        if i % every == 0:
            row = {"iteration": i, "kind": "eval", "eval_diversity": 0.3}
            row |= {"eval_reward_mine": 0.5, "eval_reward_avg": 0.5}
            rows.append(row | (evals(i) if evals else {}))
        if i < count:
            row = {
                "iteration": i,
                "kind": "train",
                "reward_avg": 0.5 + 0.02 * rng.normal(),
                "reward_std_mean": 0.2,
                "zero_std_ratio": 0.1,
                "clipfrac": 0.1,
                "ratio": 1.0,
                "ratio_gap": 0.0,
                "grad_norm": 0.01,
                "policy_loss": 0.0,
                "trained_prompt_num_batch": 8.0,
                "trained_prompt_num": 8 * (i + 1),
            }
            rows.append(row | (train(i) if train else {}))
    return rows


def held_out(value):
    return {"eval_reward_mine": value, "eval_reward_avg": value}


def rising(i):
    return held_out(0.5 + 0.002 * i)


RUNS = {
    "learning": (
        run(evals=rising, train=lambda i: {"reward_avg": 0.5 + 0.002 * i}),
        "good",
        "learning: held-out reward +0.1 over the last 50 iterations; nothing else got "
        "worse",
    ),
    "flat": (
        run(),
        "bad",
        "not learning: held-out reward +0 over 200 iterations",
    ),
    "no_spread": (
        run(train=lambda i: {"zero_std_ratio": 0.71}),
        "bad",
        "not learning: 71% of groups have no spread: all images of a prompt get the "
        "same reward, and nothing is learned from them",
    ),
    "clipped": (
        run(train=lambda i: {"clipfrac": 0.86}),
        "bad",
        "not learning: 86% of the ratios are clipped away and teach nothing",
    ),
    "diverging": (
        run(train=lambda i: {"ratio": 1.4 if i >= 150 else 1.0}),
        "bad",
        "diverging: ratio off 1: 1.4",
    ),
    "hacking": (
        run(evals=lambda i: rising(i) | {"eval_diversity": 0.3 - 0.001 * i}),
        "bad",
        "hacking: diversity falls while the reward rises",
    ),
    "few_prompts": (
        run(evals=rising, train=lambda i: {"trained_prompt_num": 6}),
        "warn",
        "too few prompts: 6, each of them seen 267 times",
    ),
    "failing": (
        run(train=lambda i: {"reward_failed": 0.12}),
        "bad",
        "reward failing: 12.0% of the prompts got no reward over the last 50 iterations",
    ),
    "finished": (
        run(1000, evals=rising, every=250, last=True),
        "plain",
        "finished: all 1,000 iterations",
    ),
    "resumed": (
        run(train=lambda i: {"time/process": 1 + (i >= 40) + (i >= 80)}),
        "plain",
        "resumed 2 times, at iteration 40, 80",
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_what_a_run_shows_is_said(kind):
    """Oracle: the words, by hand; every verdict but good news says what to do."""
    rows, tone, says = RUNS[kind]
    found = verdicts(rows, CONFIG)
    assert (kind, tone, says) in [(one.kind, one.tone, one.says) for one in found]
    assert all(one.do for one in found if one.kind != "learning")
    assert "\n" not in "".join(one.says + one.do for one in found)


@pytest.mark.parametrize(
    "kind", ["learning", "flat", "no_spread", "clipped", "hacking"]
)
def test_the_headline_is_what_the_run_is_about(kind):
    """Oracle: by hand; one thing is told once, and the cause in place of the symptom."""
    found = verdicts(RUNS[kind][0], CONFIG)
    assert found[0].kind == kind
    kinds = [one.kind for one in found]
    assert len(set(kinds)) == len(kinds)
    assert ("flat" in kinds) == (kind == "flat")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (run(train=lambda i: {"grad_norm": math.nan} if i == 199 else {}), "is nan at"),
        (run(train=lambda i: {"grad_norm": 0.01 + (i > 180)}), "101 times its usual"),
        (
            run(train=lambda i: {"reward_avg": 0.9 if i < 150 else 0.3}),
            "training reward fell from 0.9 (iteration 10) to 0.3",
        ),
    ],
)
def test_ways_to_diverge(rows, says):
    """Oracle: by hand."""
    found = verdicts(rows, CONFIG)
    assert found[0].kind == "diverging" and says in found[0].says


def test_what_a_run_gained_is_told_after_it_has_stopped_to_learn():
    """Oracle: by hand; a run that has lost its gain is told so."""
    level = run(600, evals=lambda i: held_out(min(0.9, 0.5 + 0.002 * i)))
    assert verdicts(level, CONFIG)[0].says.startswith(
        "level: held-out reward +0.4 since the start, and +0 over the last 200"
    )
    lost = run(600, evals=lambda i: held_out(0.9 if i < 400 else 0.6))
    assert verdicts(lost, CONFIG)[0].says.startswith(
        "getting worse: held-out reward −0.3"
    )


def test_little_is_said_of_little():
    """Oracle: by hand; no rows, a few rows, and rows without evaluations."""
    assert [one.kind for one in verdicts([], {})] == ["early"]
    assert verdicts(run(10), CONFIG)[0].says == "too early to tell: 10 iterations"
    rows = [row for row in run(200, train=lambda i: {"reward_avg": i / 200})]
    rows = [row for row in rows if row["kind"] == "train"]
    assert verdicts(rows, CONFIG)[0].says.startswith("learning: training reward +0.")


def test_a_run_that_learns_with_few_groups_is_warned():
    """Oracle: by hand; learning comes first, and the share is not called its failure."""
    rows = run(evals=rising, train=lambda i: {"zero_std_ratio": 0.6})
    first, second = verdicts(rows, CONFIG)
    assert (first.kind, second.tone) == ("learning", "warn")
    assert second.says.startswith("60% of groups have no spread")


def test_accuracy_is_told_in_points():
    """Oracle: by hand."""
    rows = run(evals=lambda i: rising(i) | {"eval_overall_accuracy": 0.5 + i / 1000})
    assert (
        "held-out score +5.0 points over the last 50" in verdicts(rows, CONFIG)[0].says
    )
