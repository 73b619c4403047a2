"""The table of scores: tasks and the overall score, nothing else."""

from flowgrpo_jax.report import scores as report_scores


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
    table = report_scores.score_table([row, row])
    assert table.count("<td>colors</td>") == table.count("<td>overall</td>") == 1
    assert "reward" not in table
