"""What a run was made on, and the line where it goes on elsewhere."""

import json
import subprocess

import pytest

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report.page import write_report
from flowgrpo_jax.runtime import environment as env


def test_it_holds_what_decides_about_digits():
    """Oracle: the machine; all of it is JSON, and it is the same a second time."""
    now = env.environment()
    assert json.loads(json.dumps(now)) == now == env.environment()
    assert now["platform"] == "cpu" and now["jax"] == env.versions(["jax"])["jax"]
    assert now["cores"] >= 1 and now["python"] and now["cpu"]
    assert "device_count" not in now["xla_flags"]


CPUINFO = """processor\t: 0
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse avx fma avx2 bmi2

processor\t: 1
model name\t: another
flags\t\t: avx512f
"""


def test_the_instructions_of_a_cpu(tmp_path):
    """Oracle: the text of /proc/cpuinfo, of x86, of ARM and of none."""
    (tmp_path / "x86").write_text(CPUINFO)
    assert env.cpu(tmp_path / "x86") == ("AMD EPYC 7B13", ("avx", "avx2", "fma"))
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd sve\n")
    assert env.cpu(tmp_path / "arm")[1] == ("asimd", "sve")
    assert env.cpu(tmp_path / "none")[1] == ()


def test_going_on_elsewhere_is_one_line(tmp_path, monkeypatch):
    """Oracle: the rule; the history says from which iteration on what was so."""
    first = env.environment()
    assert env.record(tmp_path, 0) == ""
    assert env.record(tmp_path, 10) == ""
    assert env.history(tmp_path) == [{"from_iteration": 0, "environment": first}]

    other = first | {"jax": "9.9", "cpu": "Other", "cores": first["cores"] + 1}
    monkeypatch.setattr(env, "environment", lambda: other)
    line = env.record(tmp_path, 20)
    assert line.startswith("environment: from iteration 20 on another one (")
    assert f"jax {first['jax']} -> 9.9" in line and "-> Other" in line
    assert "cores" not in line and "\n" not in line
    assert [e["from_iteration"] for e in env.history(tmp_path)] == [0, 20]
    assert env.record(tmp_path, 30) == ""

    monkeypatch.setattr(env, "environment", lambda: first)
    assert "9.9 ->" in env.record(tmp_path, 30)
    assert [e["from_iteration"] for e in env.history(tmp_path)] == [0, 20, 30]
    assert env.record(tmp_path, 15) == ""  # an older checkpoint: made again here
    assert [e["from_iteration"] for e in env.history(tmp_path)] == [0]
    monkeypatch.setattr(env, "environment", lambda: other)
    assert env.record(tmp_path, 0) == ""  # from the beginning: all of it is new
    assert env.history(tmp_path) == [{"from_iteration": 0, "environment": other}]


@pytest.mark.parametrize("text", ["[", "3", '[{"from_iteration": 0}]', "[" * 100_000])
def test_a_broken_file_is_one_line(tmp_path, text):
    """Oracle: the line; the file stays."""
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(UserError, match=r"environment\.json: cannot be read .*delete"):
        env.record(tmp_path, 0)
    assert (tmp_path / "environment.json").read_text() == text


def test_the_commit_is_that_of_a_checkout(tmp_path):
    """Oracle: git itself; nothing of a checkout that the package is only in."""

    def git(*words):
        words = ("git", "-c", "user.name=a", "-c", "user.email=a@b", *words)
        done = subprocess.run(
            words, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert env.commit.__wrapped__(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert env.commit.__wrapped__(tmp_path) == f"{head}-dirty"
    (tmp_path / "inside").mkdir()
    assert env.commit.__wrapped__(tmp_path / "inside") is None
    assert env.commit.__wrapped__(tmp_path / "nowhere") is None


def test_the_report_shows_it(tmp_path):
    """Oracle: the text, escaped; a run that kept none has no such section."""
    (tmp_path / "config.json").write_text("{}")
    assert "Made on" not in write_report(tmp_path).read_text()
    entries = [
        {"from_iteration": 0, "environment": {"cpu": "<b>One</b>", "jax": "1.0"}},
        {"from_iteration": 7, "environment": {"cpu": "Two", "jax": "1.0"}},
    ]
    (tmp_path / "environment.json").write_text(json.dumps(entries))
    page = write_report(tmp_path).read_text()
    assert "&lt;b&gt;One&lt;/b&gt;" in page and "<b>One" not in page
    assert "from iteration 7" in page and "cpu" in page


def test_another_mesh_is_kept_and_is_no_news(tmp_path):
    """Oracle: by hand; the order in which updates add up, of which no line is made."""
    for start, mesh in ((0, {"data": 2}), (4, {"data": 2}), (8, {"data": 1})):
        assert env.record(tmp_path, start, mesh) == ""
    kept = [(one["from_iteration"], one["mesh"]) for one in env.history(tmp_path)]
    assert kept == [(0, {"data": 2}), (8, {"data": 1})]
