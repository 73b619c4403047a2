"""XManager itself on this machine, where the extra `xm` is installed."""

import os
import sys
from pathlib import Path

import pytest
from absl import flags

from flowgrpo_jax.errors import UserError
from launch import beside, hyper, slots, states, xm
from tests.launch import fakes
from tests.launch.test_local import most_at_once

SLOTS = [slots.Slot("a", {}), slots.Slot("b", {})]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Four units of the fake main, the third of which is refused."""
    fakes.install(tmp_path, monkeypatch)
    path = [os.environ["PYTHONPATH"], str(xm.command.REPOSITORY)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    acts = hyper.product(
        [
            hyper.zipit(
                [
                    hyper.sweep("act", ["finish", "finish", "refuse", "finish"]),
                    hyper.sweep("config.seed", [1, 2, 3, 4]),
                ]
            ),
            hyper.fixed("seconds", 0.5),
        ]
    )
    made = fakes.sweep(tmp_path, acts)
    monkeypatch.setattr(xm.command, "prepared", lambda *_: made)
    monkeypatch.setattr(xm.slots, "of_this_machine", lambda count: SLOTS[:count])
    flags.FLAGS(["xm", "--max_parallel=2"])
    return made


@pytest.mark.skipif(xm.xm is None, reason="needs the extra xm")
def test_an_experiment_of_xmanager(sweep, tmp_path, capfd):
    """Oracle: events of the fake main; two at once, one failure does not end the rest."""
    assert xm.main(["xm"]) == 1  # one was refused
    assert [one.word for one in states.of(sweep)] == [
        *("finished", "finished", "failed", "finished")
    ]
    starts = [event for event in fakes.events(tmp_path) if event[:5] == "start"]
    assert len(starts) == 4
    ended = [event for event in fakes.events(tmp_path) if "act=refuse" not in event]
    assert most_at_once(ended) == 2
    told = capfd.readouterr().out
    assert "~/.xmanager/experiments.sqlite3" in told
    assert Path("~/.xmanager/experiments.sqlite3").expanduser().exists()


# Says when it starts and ends, in the events of the units.
BESIDE = """
import signal, sys, time
def event(word):
    with open(sys.argv[1], "a") as file:
        file.write(word + " server\\n")
def stop(*_):
    event("end")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
event("start")
time.sleep(600)
"""


@pytest.mark.skipif(xm.xm is None, reason="needs the extra xm")
def test_a_reward_server_runs_beside_the_units(sweep, tmp_path, monkeypatch):
    """Oracle: events; it starts, ends after the last unit, and does not fail the sweep."""
    package = tmp_path / "fake" / "flowgrpo_jax"
    (package / "server.py").write_text(BESIDE)
    monkeypatch.setattr(xm, "SERVER", ("flowgrpo_jax.server",))
    flags.FLAGS(["xm", f"--reward_server='{tmp_path / 'events.txt'}'"])
    assert xm.main(["xm"]) == 1  # of the unit that is refused
    flags.FLAGS["reward_server"].unparse()
    told = fakes.events(tmp_path)
    assert told.count("start server") == told.count("end server") == 1
    assert told[-1] == "end server"
    assert len([event for event in told if event.startswith("start")]) == 5


def test_a_program_beside_ends_with_the_units(tmp_path):
    """Oracle: exit codes, by hand: its own where it ends first, 0 where it was ended."""
    ended = tmp_path / "ended"
    assert beside.run(ended, [sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    ended.touch()
    assert beside.run(ended, [sys.executable, "-c", "import time; time.sleep(60)"]) == 0


def test_without_xmanager_it_is_one_line(monkeypatch, capsys):
    """Oracle: the line and the exit code, by hand."""
    monkeypatch.setattr(xm, "xm", None)
    assert xm.main(["xm"]) == 2
    assert "launch.xm: needs XManager: uv pip install" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs XManager"):
        xm._launch([])
