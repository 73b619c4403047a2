"""The benchmark of the released sizes runs, at small size, beside its torch peer."""

from pathlib import Path

from benchmarks import real_size


def test_small_size_beside_the_peer(tmp_path):
    """Oracle: an invariance (the gap is 0), and positive times of every run."""
    machine, rows = real_size.measure("small", repeats=1, remat="none")
    assert "float32" in machine
    assert [row[0] for row in rows] == ["g1", "g3", "g5", "g11"]
    for row in rows[:3]:
        assert float(row[2]) > 0 and float(row[3]) > 0 and row[5] == "-"
    assert float(rows[3][2]) == 0 and float(rows[3][3]) < 1e-5
    text = real_size.section("small", machine, rows)
    path = Path(tmp_path) / "performance.md"
    for _ in range(2):
        real_size.write(path, "small", text)
    written = path.read_text()
    assert written.count("## ") == 3 and written.count("not measured |") == 2 * 4 * 5
    assert text in written
