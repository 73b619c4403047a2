"""The table of scores: tasks and the overall score, nothing else."""

from flowgrpo_jax.report import scores as report_scores
from flowgrpo_jax.runtime import metric_names


def test_means_over_images_are_no_task():
    """Oracle: the names of the columns, by hand; eval_reward_accuracy is a monitor."""
    row = {
        "eval_colors_accuracy": 0.5,
        "eval_overall_accuracy": 0.5,
        "eval_reward_accuracy": 0.4,
        "eval_reward_strict_accuracy": 0.4,
        "eval_unguided_colors_accuracy": 0.3,
        "eval_unguided_overall_accuracy": 0.3,
        "eval_unguided_reward_accuracy": 0.2,
    }
    rows = [{"iteration": i} | row for i in (0, 4)]
    table = report_scores.score_table(rows)
    assert [row.task for row in table] == ["colors", "overall"]
    assert [row.is_overall for row in table] == [False, True]
    assert table[0].guided == report_scores.Change(0.5, 0.5)
    assert table[1].unguided == report_scores.Change(0.3, 0.3)


def test_tasks_of_any_name_have_a_row():
    """Oracle: by hand; tasks called like a reward, a column, or with underscores."""
    tasks = ("reward_model", "unguided_x", "a_b_c")
    row = {metric_names.accuracy(task): 0.5 for task in tasks}
    table = report_scores.score_table([{"iteration": 0} | row])
    assert [one.task for one in table] == [task.replace("_", " ") for task in tasks]
    assert all(one.unguided is None for one in table)


def test_a_change_has_its_sign_and_colour():
    """Oracle: the texts, written out by hand."""
    change = report_scores.Change(0.5, 0.25)
    assert (change.before, change.after, change.difference) == (
        "50.0%",
        "25.0%",
        "−25.0",
    )
    assert change.css == "down" and change.lower == 0.25
    change = report_scores.Change(1.0, 1.5, percent=False)
    assert (change.difference, change.css) == ("+0.5", "up")
    for last in (0.5004, 0.4996):
        change = report_scores.Change(0.5, last)
        assert (change.difference, change.css) == ("+0.0", "soft")
