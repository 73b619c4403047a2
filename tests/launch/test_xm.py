"""XManager itself on this machine, where the extra `xm` is installed."""

import os
from pathlib import Path

import pytest
from absl import flags

from flowgrpo_jax.errors import UserError
from launch import hyper, slots, states, xm
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


def test_without_xmanager_it_is_one_line(monkeypatch, capsys):
    """Oracle: the line and the exit code, by hand."""
    monkeypatch.setattr(xm, "xm", None)
    assert xm.main(["xm"]) == 2
    assert "launch.xm: needs XManager: uv pip install" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs XManager"):
        xm._launch([])
