"""ROOT/XID: the same sweep goes on, another one is refused."""

import pytest

from flowgrpo_jax.errors import UserError
from launch import hyper, sweep_dir, units


def made(seeds, *extra):
    return units.make("a.py", hyper.sweep("config.seed", seeds), extra)


def test_the_same_sweep_has_the_same_number(tmp_path):
    """Oracle: by hand; what a resumed run may change makes no other sweep."""
    root = str(tmp_path / "my runs")

    def opened(seeds, *extra, xid=None):
        return sweep_dir.open_sweep(root, xid, made(seeds, *extra), "command").xid

    assert [opened([1, 2]), opened([1, 2]), opened([1, 3])] == ["1", "1", "2"]
    assert opened([1, 2], "--config.num_iterations=8") == "1"
    assert opened([1, 2], "--config.train.beta=1") == "3"
    assert opened([1, 2], xid="named") == "named"
    read = sweep_dir.read(f"{root}/1")
    assert read.units == tuple(made([1, 2], "--config.num_iterations=8"))
    assert read.words(read.units[0], "/there")[-1] == "--workdir=/there/1/1-seed=1"


def test_what_is_refused(tmp_path):
    """Oracle: the lines, by hand; nothing is changed."""
    sweep_dir.open_sweep(str(tmp_path), "7", made([1, 2]), "command")
    before = (tmp_path / "7" / "sweep.json").read_bytes()
    for seeds, line in (
        ([1, 3], "unit 2 has --config.seed=2 there and --config.seed=3 here: take"),
        ([1], "of 2 units, these are 1: take another --xid"),
    ):
        with pytest.raises(UserError, match=f"--xid: 7: .*holds another sweep: {line}"):
            sweep_dir.open_sweep(str(tmp_path), "7", made(seeds), "command")
    assert (tmp_path / "7" / "sweep.json").read_bytes() == before
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "mine.txt").write_text("")
    for xid, line in (
        ("8", "holds no sweep"),
        ("../9", "must be a name"),
        ("", "must"),
    ):
        with pytest.raises(UserError, match=line):
            sweep_dir.open_sweep(str(tmp_path), xid, made([1]), "command")
    with pytest.raises(UserError, match="holds no sweep.json: give ROOT/XID"):
        sweep_dir.read(tmp_path / "8")
    (tmp_path / "7" / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read .'units'.: delete it"):
        sweep_dir.read(tmp_path / "7")
