"""What came of a sweep: groups, scores, the page; in any state."""

import json
import re

import pytest

from flowgrpo_jax.errors import UserError
from launch import hyper, live, page, results, states, sweep_dir, table, units

ACCURACY = "eval_overall_accuracy"


@pytest.fixture
def sweep(tmp_path):
    """Two rates x two seeds: three finished, one that failed."""
    points = hyper.product(
        [
            hyper.sweep("config.train.learning_rate", [1e-4, 1e-3]),
            hyper.sweep("config.seed", [1, 2]),
        ]
    )
    made = units.make("a.py", points)
    found = sweep_dir.open_sweep(str(tmp_path / "a <root>"), "1", made, "the <command>")
    scores = iter([0.5, 0.7, 0.9, None])
    for unit in made:
        workdir, score = found.workdir(unit), next(scores)
        workdir.mkdir()
        rows = [
            {"iteration": 0, "kind": "eval", ACCURACY: 0.1, "time/wall": 10.0},
            {"iteration": 0, "kind": "train", "reward_avg": 0.2, "time/wall": 20.0},
            {"iteration": 1, "kind": "train", "reward_avg": 0.3, "time/wall": 30.0},
        ]
        if score is not None:
            rows.append({"iteration": 4, "kind": "eval", ACCURACY: score})
            (workdir / "report.html").write_text("")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / "metrics.jsonl").write_text(text)
        (workdir / "config.json").write_text(json.dumps({"num_iterations": 4}))
        (workdir / "log.txt").write_text("loading\nerror: <b>: no room\n\n")
        code = 1 if score is None else 0
        record = {"words": found.words(unit), "code": code}
        (workdir / "unit.json").write_text(json.dumps(record))
    return found


def test_groups_are_ordered_by_their_mean(sweep):
    """Oracle: by hand; seeds stand together, a failed unit has its last line."""
    made = results.of(states.of(sweep))
    assert made.metric == ACCURACY and made.keys == ["config.train.learning_rate"]
    assert [group.values for group in made.groups] == [("0.0001",), ("0.001",)]
    first, second = made.groups
    assert first.mean == pytest.approx(0.6) and first.spread == pytest.approx(0.02**0.5)
    # The failed unit has the score of the one evaluation that it came to.
    assert second.mean == pytest.approx(0.5)
    lines = table.text(made).splitlines()
    assert lines[0] == f"score: {ACCURACY}"
    assert re.split(r"  +", lines[1].strip()) == (
        "learning_rate mean std unit state iteration score".split()
    )
    assert re.split(r"  +", lines[2]) == [
        *("0.0001", "0.6", "0.1414", "1-learning_rate=0.0001,seed=1", "finished"),
        *("2/4", "0.5"),
    ]
    assert lines[5].split("  ")[-1] == "error: <b>: no room" and "failed" in lines[5]


def test_another_metric(sweep):
    """Oracle: the rows above; a name that no unit has is told."""
    now = states.of(sweep)
    assert results.of(now, "reward_avg").groups[0].mean == pytest.approx(0.3)
    with pytest.raises(
        UserError, match="--metric: acc: no unit has it: they have eval_"
    ):
        results.of(now, "acc")


def test_the_page(sweep):
    """Oracle: links, curves and escaped text, by hand."""
    path = page.write(sweep, results.of(states.of(sweep)))
    words = path.read_text()
    assert '<a href="1-learning_rate=0.0001,seed=1/report.html">' in words
    assert "4-learning_rate=0.001,seed=2/report.html" not in words  # it has none
    assert "error: &lt;b&gt;: no room" in words and "the &lt;command&gt;" in words
    assert "3 of 4 units finished" in words
    assert f"<h3>{ACCURACY}</h3>" in words and "<h3>reward_avg</h3>" in words
    assert 'class="line c1"' in words and 'class="line c2"' in words


def test_states_of_units_that_wait_go_on_or_ended(sweep):
    """Oracle: by hand, from the records."""
    unit = sweep.units[0]
    record = sweep.workdir(unit) / "unit.json"

    def word(**values):
        record.write_text(json.dumps({"words": sweep.words(unit)} | values))
        return states.state(sweep.workdir(unit), unit).word

    assert word(code=0) == "finished" and word(code=143) == "stopped"
    assert word(code=137) == "killed" and word(code=2) == "failed"
    assert word(host="elsewhere", pid=1) == "running"
    running = states.state(sweep.workdir(unit), unit)
    assert running.left == pytest.approx(20.0)  # 20 s for 2 iterations, 2 to go
    longer = [*unit.words, "--config.num_iterations=9"]
    assert word(code=0, words=longer) == "waiting"  # it finished another length
    record.unlink()
    assert states.state(sweep.workdir(unit), unit).word == "waiting"


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_live_table_is_drawn_in_place(sweep):
    """Oracle: the escape code that goes up as many lines as were drawn."""
    terminal = Terminal()
    shown = live.Live(sweep, terminal)
    shown.show()
    shown.show()  # too soon
    assert terminal.text.count("\n") == 5 and "\033[" not in terminal.text
    shown.show(at_once=True)
    assert "\033[5F\033[J" in terminal.text
    shown.message("a line")
    assert terminal.text.endswith("\033[5F\033[Ja line\n")


def test_the_command_wants_one_sweep():
    """Oracle: the line, by hand."""
    with pytest.raises(UserError, match="give one ROOT/XID"):
        table.main([])
