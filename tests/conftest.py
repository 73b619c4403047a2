"""Shapes and types of the package are checked while the tests run.

`--all` adds the cases that are marked `more`: one more mesh or combination of what
another case shows, for a minute or more of compiling each.
"""

import contextlib
import gc
import os
import shutil
import sqlite3
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Unrolled loops compute the same up to rounding; without them a program is compiled in
# two thirds of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_extra_options="
    "xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size",
)
from jaxtyping import install_import_hook

install_import_hook("flowgrpo_jax", "beartype.beartype")


# Programs that live as long as the process are many objects to go through again.
gc.set_threshold(100_000, 20, 50)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="cases marked `more` too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("more")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_configure(config):
    """What one test process has compiled, the others take from a folder of this run.

    Most of the time goes into compiling. The first process makes the folder, unless
    whoever started it has named one; workers inherit its name.
    """
    if not hasattr(config, "workerinput"):
        config.compiled = ""
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            config.compiled = tempfile.mkdtemp()
            os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and config.compiled:
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """A weights file of the tiny model."""
    from flowgrpo_jax.worlds import embedded
    from tests.tiny import tiny_model

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model, variables = tiny_model()
    embedded.save(path, variables, model)
    return str(path)


@pytest.fixture
def full_disk(monkeypatch):
    """A context in which no database can grow: SQLite's own limit of pages."""
    connect = sqlite3.connect

    def limited(path, **options):
        connection = connect(path, **options)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    @contextlib.contextmanager
    def full():
        with monkeypatch.context() as patched:
            patched.setattr(sqlite3, "connect", limited)
            yield

    return full
