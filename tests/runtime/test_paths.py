"""Paths as people write them."""

from pathlib import Path

from flowgrpo_jax.runtime import paths


def test_home_is_the_home_folder(monkeypatch):
    """Oracle: what a shell does, by hand."""
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.local("~") == Path("/home/me")
    assert paths.local("~/a/~b") == Path("/home/me/a/~b")
    assert paths.local("a/~") == Path("a/~")
    assert paths.local("~nobodyofthisname/x") == Path("~nobodyofthisname/x")
