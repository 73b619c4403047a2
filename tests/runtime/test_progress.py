"""The progress line."""

import io
import os
import pty

from flowgrpo_jax.runtime.progress import Progress


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(stream, clock, seconds: list[float], **options) -> None:
    with Progress(len(seconds), stream=stream, clock=clock, **options) as progress:
        for iteration, passed in enumerate(seconds):
            clock.now += passed
            progress.update(iteration, reward=0.25, images=20)


def test_without_a_terminal_a_plain_line_every_half_minute_and_at_the_end():
    """Oracle: the lines, written out by hand for a clock the test holds."""
    stream = io.StringIO()
    drive(stream, Clock(), [50.0, 10, 10, 10, 10])
    assert stream.getvalue().splitlines() == [
        "iteration 1/5: reward 0.250, 0.4 images/s",
        "iteration 4/5: reward 0.250, 2.0 images/s, 0:10 left",
        "iteration 5/5: reward 0.250, 2.0 images/s, 0:00 left",
    ]


def test_nothing_but_messages_when_told():
    """Oracle: the rule; log_every=None writes no lines, messages stay."""
    stream = io.StringIO()
    drive(stream, Clock(), [50.0, 50], log_every=None)
    with Progress(2, stream=stream, log_every=None) as progress:
        progress.message("a table")
    assert stream.getvalue() == "a table\n"


def test_the_pace_leaves_evaluations_and_compilation_out():
    """Oracle: 10 s an iteration, whatever lies between; long times have hours."""
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, start=497, log_every=0, stream=stream, clock=clock)
    for iteration, passed in ((497, 90.0), (498, 10.0), (499, 10.0)):
        clock.now += 500
        progress.skip()
        clock.now += passed
        progress.update(iteration, 0.5, 10)
    assert stream.getvalue().splitlines()[-1] == (
        "iteration 500/1000: reward 0.500, 1.0 images/s, 1:23:20 left"
    )


def test_no_time_to_go_before_it_is_known_and_evaluations_count():
    """Oracle: by hand: the first iteration compiles; an evaluation takes 100 s."""
    clock, stream = Clock(), io.StringIO()
    pauses = {0, 2, 4}
    progress = Progress(4, 0, pauses, log_every=0, stream=stream, clock=clock)
    for iteration in range(4):
        if iteration in pauses:
            clock.now += 300 if iteration == 0 else 100
            progress.skip()
        clock.now += 60 if iteration == 0 else 10
        progress.update(iteration, 0.5, 10)
    times = [line.split("images/s")[1] for line in stream.getvalue().splitlines()]
    assert times == ["", ", 10:20 left", ", 1:50 left", ", 1:40 left"]


def test_a_terminal_gets_a_bar_with_everything_on_it():
    """Oracle: the text on a pseudo-terminal."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        clock = Clock()
        with Progress(4, start=1, stream=stream, clock=clock) as progress:
            for iteration in (1, 2):
                clock.now += 2.0
                progress.update(iteration, reward=0.625, images=20)
            progress.message("evaluated")
        stream.flush()
        shown = ""
        while "evaluated" not in shown or "3/4" not in shown.split("evaluated")[-1]:
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    assert "3/4, reward 0.625, 10.0 images/s, 0:02 left" in shown
    assert "evaluated" in shown
