"""Signals and the end of a process, seen from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowgrpo_jax.runtime import stopping
from flowgrpo_jax.runtime.stopping import GracefulStop

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(source: str, *arguments: str) -> subprocess.Popen:
    """A process that has said its first line."""
    child = subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    child.stdout.readline()
    return child


LOOP = """
import signal, sys, time
# A process that a shell has put in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from flowgrpo_jax.runtime import stopping
from flowgrpo_jax.runtime.stopping import GracefulStop
if sys.argv[1] == "command":
    stopping.install()
with GracefulStop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", STATUS)
@pytest.mark.parametrize("second", STATUS)
def test_the_first_signal_asks_and_the_second_ends(first, second):
    """Oracle: the exit status of a shell for that signal."""
    child = start(LOOP, "command")
    child.send_signal(first)
    assert child.stdout.readline() == "stopping\n"
    child.send_signal(second)
    errors = child.communicate(timeout=30)[1]
    assert child.returncode == STATUS[second]
    assert errors.splitlines() == [
        f"{first.name}: saving, then stopping (again: at once)",
        f"{second.name}: stopped",
    ]


@pytest.mark.parametrize("second", STATUS)
def test_elsewhere_the_second_does_what_it_did_before(second):
    """Oracle: Python's own handlers."""
    child = start(LOOP, "notebook")
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "stopping\n"
    child.send_signal(second)
    errors = child.communicate(timeout=30)[1]
    assert child.returncode == -second
    assert ("KeyboardInterrupt" in errors) == (second == signal.SIGINT)


# A command in whatever it does when the signal comes; it must end at once.
COMMAND = """
import contextlib, gc, sys, threading, time
from flowgrpo_jax.runtime import stopping
stopping.install()
def asleep():
    time.sleep(60)
def busy():
    while True:
        sum(range(1000))
def in_c_without_the_lock():  # as a compilation is
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
def collecting():  # what is raised here, Python drops
    gc.callbacks.append(lambda *_: time.sleep(0.01))
    while True:
        gc.collect()
def swallowing():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
def importing():
    sys.modules.pop("json", None)
    while True:
        import json
        sys.modules.pop("json")
def with_nothing_to_save():
    with stopping.GracefulStop() as stop:
        stop.unsaved = False
        time.sleep(60)
def afterwards():
    with stopping.GracefulStop() as stop:
        pass
    time.sleep(60)
def behind_an_event_loop():
    import asyncio
    async def wait():
        asyncio.get_running_loop().add_signal_handler(10, print)
        await asyncio.sleep(60)
    asyncio.run(wait())
def behind_one_that_is_closed():
    import asyncio
    async def wait():
        asyncio.get_running_loop().add_signal_handler(10, print)
    asyncio.run(wait())
    while True:
        time.sleep(0.01)
def beside_workers():
    time.sleep(60)
if sys.argv[1] == "beside_workers":
    import multiprocessing
    multiprocessing.get_context("fork").Process(target=asleep).start()
print("ready", flush=True)
globals()[sys.argv[1]]()
"""
MOMENTS = [
    line.split()[1].partition("(")[0]
    for line in COMMAND.splitlines()
    if line.startswith("def ")
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_command_ends_in_one_line_whatever_it_does(moment):
    """Oracle: exit status and stderr, by hand; its output is closed with it."""
    assert len(MOMENTS) == 11
    for number, status in STATUS.items():
        child = start(COMMAND, moment)
        time.sleep(0.05)
        child.send_signal(number)
        errors = child.communicate(timeout=30)[1]
        assert (child.returncode, errors) == (status, f"{number.name}: stopped\n")


def test_a_command_has_the_handlers_before_its_own_imports():
    """Oracle: a module that is looked for by `python -m` before jax is imported."""
    source = (
        "import sys; sys.argv = ['-m']\n"  # as the interpreter has it meanwhile
        "import flowgrpo_jax, os, signal, time\n"
        "assert 'jax' not in sys.modules\n"
        "print(flush=True); time.sleep(60)"
    )
    child = start(source)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[1] == "SIGINT: stopped\n"
    assert child.returncode == 130
    plain = "import flowgrpo_jax, signal; print(signal.getsignal(15) is signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", plain], stdout=subprocess.PIPE)
    assert done.stdout == b"True\n"


SETTING = """
import os, signal, sys, threading
start = threading.Thread.start
def interrupted(thread):
    threading.Thread.start = start
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    start(thread)
threading.Thread.start = interrupted
print(flush=True)
from flowgrpo_jax.runtime import stopping
stopping.install()
threading.Event().wait(60)
"""


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_while_the_handlers_are_being_set(number):
    """Oracle: exit status and stderr, by hand; Python's own would be a traceback."""
    child = start(SETTING, number.name)
    assert child.communicate(timeout=30)[1] == f"{number.name}: stopped\n"
    assert child.returncode == STATUS[number]


def test_handlers_are_put_back():
    """Oracle: the handlers before, with and without a signal in between."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with GracefulStop() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 30
        while not stop.requested and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(stopping.Stopped):
            stop.check()
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


FORK = """
import os, signal, threading, time
from flowgrpo_jax.runtime.stopping import GracefulStop
def fork():
    child = os.fork()
    if child == 0:
        while signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            time.sleep(0.01)
        os._exit(1)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    print(os.waitpid(child, 0)[1])
with GracefulStop() as stop:
    fork()
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.requested:
        time.sleep(0.01)
"""


def test_a_signal_ends_a_forked_child_of_any_thread():
    """Oracle: the kernel's default action; the parent's own handler stays."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "15\n15\n"), done.stderr


EARLY = """
import os, signal, time
def at_once():  # before any hook of ours: what comes first is called first
    os.kill(os.getpid(), signal.SIGTERM)
os.register_at_fork(after_in_child=at_once)
from flowgrpo_jax.runtime.stopping import GracefulStop
with GracefulStop() as stop:
    child = os.fork()
    if child == 0:
        os._exit(1)
    print(os.waitpid(child, 0)[1])
    time.sleep(0.5)
    print(stop.requested)
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.requested:
        time.sleep(0.01)
"""


def test_a_signal_to_a_child_that_has_just_begun_is_its_own():
    """Oracle: the kernel's default action; the parent hears nothing of it, but of its
    own signals still."""
    done = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "15\n0\n"), done.stderr


# What may hold a process that has printed its last line.
HELD = """
import atexit, multiprocessing, sys, threading, time
from flowgrpo_jax.runtime import stopping
stopping.install()
def thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
def workers():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
def exit_function():
    atexit.register(time.sleep, 60)
def nothing():
    atexit.register(print, "said at the end")
globals()[sys.argv[1]]()
print("result")
stopping.finish(int(sys.argv[2]), 0.2)
"""


@pytest.mark.parametrize("held_by", ["thread", "workers", "exit_function", "nothing"])
def test_nothing_holds_a_process_that_is_done(held_by):
    """Oracle: its own status; what it said is there, and so are its exit functions."""
    for status in ("0", "2"):
        done = subprocess.run(
            [sys.executable, "-c", HELD, held_by, status],
            capture_output=True,
            text=True,
            timeout=30,
        )
        said = ["result"] + ["said at the end"] * (held_by == "nothing")
        assert (done.returncode, done.stderr) == (int(status), "")
        assert done.stdout.splitlines() == said
