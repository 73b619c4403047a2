"""What is said to XLA, and that the user has the last word."""

import os

import jax
import pytest

from flowgrpo_jax.runtime import platform


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """XLA_FLAGS after `configure`, given those before."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})

    def flags(before):
        monkeypatch.setenv("XLA_FLAGS", before)
        platform.configure(tmp_path)
        return os.environ["XLA_FLAGS"].split()

    return flags


def test_one_device_per_core_and_one_library(configured):
    """Oracle: the flags by hand."""
    assert configured("") == [
        "--xla_cpu_experimental_ynn_fusion_type=",
        "--xla_force_host_platform_device_count=3",
        "--xla_cpu_multi_thread_eigen=false",
    ]


@pytest.mark.parametrize(
    "given",
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_multi_thread_eigen=true",
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT",
    ],
)
def test_flags_of_the_user_stay(configured, given):
    """Oracle: what was given, once."""
    name = given.partition("=")[0]
    assert [flag for flag in configured(given) if flag.startswith(name)] == [given]


def test_asked_twice_nothing_is_added(configured):
    """Oracle: an invariance."""
    once = configured("")
    assert configured(" ".join(once)) == once
