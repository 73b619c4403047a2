"""A user's code that raises, exits, forks, or changes what belongs to the process."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import jax
import numpy as np
import pytest

from flowgrpo_jax.errors import UserError, shown_above
from flowgrpo_jax.rewards import guard
from flowgrpo_jax.rewards.guard import RewardFailure


class Unspeakable(BaseException):
    def __str__(self):
        raise SystemExit("even this")


def line(told):
    return f"reward.mine: {told}"


def raised(error):
    def function():
        raise error.with_traceback(None)

    with pytest.raises(RewardFailure) as caught:
        guard.call(line, function)
    return caught.value


@pytest.mark.parametrize(
    "error, text",
    [
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
        (SystemExit(), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(1), "StopIteration: 1"),
        (Unspeakable(), "Unspeakable: its text cannot be shown"),
        (
            BaseExceptionGroup("two", [KeyError(1), SystemExit()]),
            "BaseExceptionGroup: ",
        ),
        (ValueError("a\nb\r\x1b[31m\x00\udce4"), r"ValueError: a b \?\[31m\?\?"),
        (ValueError("long " * 1000), "ValueError: long "),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_whatever_is_raised_is_a_line_with_its_traceback(error, text):
    """Oracle: the line by hand; the first frame is that of the function that raised."""
    for run in (raised, _on_a_thread):
        failure = run(error)
        told = str(failure)
        assert told.startswith("reward.mine: ") and len(told) < 400
        assert re.match(f"reward.mine: {text}", told)
        assert told.isprintable()
        frames = [x for x in failure.shown.splitlines() if '  File "' in x]
        assert __file__ in frames[0] and "in function" in frames[0]
        assert guard.__file__ not in failure.shown
        assert shown_above(failure) == failure.shown


def _on_a_thread(error):
    kept = []
    thread = threading.Thread(target=lambda: kept.append(raised(error)))
    thread.start()
    thread.join()
    return kept[0]


def test_errors_of_ours_are_passed_on():
    """Oracle: the same object; and what stood above an earlier line stays."""
    error = UserError("reward: mine: is wrong")
    with pytest.raises(UserError) as caught:
        guard.call(line, lambda: (_ for _ in ()).throw(error))
    assert caught.value is error and shown_above(error) == ""
    error.__cause__ = error  # a user may write `raise error from error`
    assert shown_above(error) == ""
    later = UserError("saved")
    later.__cause__ = raised(KeyError("x"))
    assert "KeyError" in shown_above(later)


def test_a_real_interrupt_is_passed_on():
    """Oracle: the signal ends the caller, not the reward; the handler stays."""
    ours = signal.default_int_handler  # in the background a shell has it ignored
    before = signal.signal(signal.SIGINT, ours)
    try:
        with pytest.raises(KeyboardInterrupt):
            guard.call(line, lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, before)


SIGNALLED = """
import os, signal, sys, time
from flowgrpo_jax.runtime import stopping
from flowgrpo_jax.rewards import guard
stopping.install()
def call():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(60)
guard.call(str, call)
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_is_not_lost_in_a_call(name, code):
    """Oracle: the exit codes of `stopping`, as without the guard."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, name],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == code
    assert done.stderr == f"{name}: stopped\n"


def change_all(folder, fails):
    os.chdir(folder)
    sys.stdout = io.StringIO()
    sys.stderr = io.StringIO()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    np.seterr(all="raise")
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", "of the user's own")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if fails:
        raise OSError("gone")


def state():
    return (
        os.getcwd(),
        sys.stdout,
        sys.stderr,
        jax.config.values["jax_enable_x64"],
        jax.config.values["jax_default_matmul_precision"],
        np.geterr(),
        [one for one in warnings.filters if one[0] == "error"],
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_what_it_changes_is_put_back(tmp_path, fails):
    """Oracle: the state before, in this thread and from another one."""
    before = state()

    def one():
        try:
            guard.call(line, lambda: change_all(tmp_path, fails))
        except RewardFailure:
            assert fails

    one()
    assert state() == before
    thread = threading.Thread(target=one)
    thread.start()
    thread.join()
    assert state() == before
    assert any(
        f[0] == "ignore" and f[1] and "user" in f[1].pattern for f in warnings.filters
    )


def test_the_last_of_several_puts_back(tmp_path):
    """Oracle: two calls that overlap; neither takes the other's change for the run's."""
    before = state()
    inside, go = threading.Event(), threading.Event()

    def first():
        os.chdir(tmp_path)
        inside.set()
        assert go.wait(10)

    thread = threading.Thread(target=lambda: guard.call(line, first))
    thread.start()
    assert inside.wait(10)
    guard.call(line, lambda: None)  # begins and ends within the first one
    go.set()
    thread.join()
    assert state() == before


def test_what_hangs_is_put_back_on_demand(tmp_path):
    """Oracle: the folder before."""
    before, inside, go = os.getcwd(), threading.Event(), threading.Event()

    def hangs():
        os.chdir(tmp_path)
        inside.set()
        assert go.wait(10)

    thread = threading.Thread(target=lambda: guard.call(line, hangs))
    thread.start()
    assert inside.wait(10)
    guard.put_back()
    assert os.getcwd() == before
    go.set()
    thread.join()


CHILDREN = """
import os, sys, threading
from flowgrpo_jax.rewards import guard
def fork(end):
    if os.fork() == 0:
        print("child", end, flush=True)
        if end == "exit":
            sys.exit(3)
        if end == "text":
            sys.exit("a text")
        if end == "raise":
            raise KeyError("x")
        if end == "code":
            os._exit(4)
        return
    print(end, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
def main():
    for end in ("return", "exit", "text", "raise", "code"):
        guard.call(str, lambda: guard.ends_children(fork)(end))
if sys.argv[1:]:
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
else:
    main()
print("once")
"""


@pytest.mark.parametrize("arguments", [[], ["thread"]])
def test_a_forked_child_ends(arguments):
    """Oracle: the codes with which Python ends; only the parent goes on."""
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = [text for text in done.stdout.splitlines() if not text.startswith("child")]
    assert told == ["return 0", "exit 3", "text 1", "raise 1", "code 4", "once"]
    assert "KeyError: 'x'" in done.stderr
