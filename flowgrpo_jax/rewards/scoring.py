"""Runs rewards on threads of their own, with a deadline, so that none can hang a run.

While one batch of images is scored the next one may be sampled. Results are joined in
the order in which the batches came, not in that in which they were ready.
"""

import concurrent.futures
import functools
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import guard, returned
from flowgrpo_jax.rewards.guard import RewardFailure
from flowgrpo_jax.rewards.registry import LARGEST, Combined, Reward

# Values in [0, 1]; a JAX array may stay on its device until a reward needs it.
Images = Float[Array | np.ndarray, "image height width channel"]
FAILURES = ("stop", "skip")
Table = dict[str, np.ndarray]
_LOOK = 0.2  # seconds between two checks whether to go on waiting


class Batch(NamedTuple):
    """Images that are being scored, with one call per reward."""

    size: int
    calls: Mapping[str, Future]


class Scorer:
    """The combined rewards of a run; a `Reward` that raises only `RewardFailure`.

    A reward is called from one thread only, and several rewards run side by side. One
    with the attribute `on_device` runs on the caller's thread instead: programs on one
    mesh must be started in one order.

    Args:
      deadline: seconds that `finish` waits for all of its batches.

    `check` is called again and again while it waits; what it raises is passed on.
    """

    def __init__(self, combined: Combined, deadline: float = 600.0):
        self.check: Callable[[], None] = lambda: None
        self._combined, self._deadline = combined, deadline
        self._lines = {name: _Line(name) for name in combined.rewards}
        self._shown: set[str] = set()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Table:
        return self.finish([self.start(images, prompts)])

    def start(self, images: Images, prompts: Sequence[Prompt]) -> Batch:
        """Begin to score these images and return at once."""
        calls = {}
        for name, reward in self._combined.rewards.items():
            call = functools.partial(_score, name, reward, images, prompts)
            if getattr(reward, "on_device", False):
                calls[name] = _done(call)
            else:
                calls[name] = self._lines[name].submit(call)
        return Batch(len(images), calls)

    def finish(self, batches: Sequence[Batch], skip: bool = False) -> Table:
        """All measurements of all images, in the order of the batches, and "avg".

        RewardFailure for a reward that raised (as soon as one does), that gave anything
        but one finite number per image, or that is not ready at the deadline. With
        `skip` the line is only printed, and the missing scores are NaN.
        """
        _wait(
            [call for b in batches for call in b.calls.values()],
            self._deadline,
            skip,
            self.check,
        )
        tables = {}
        for name in self._combined.rewards:
            parts = [self._part(name, batch.calls[name], skip) for batch in batches]
            tables[name] = _joined(name, parts, [batch.size for batch in batches])
            tables[name][name] = _finite(name, tables[name][name], skip)
        return self._combined.merge(tables)

    def _part(self, name: str, call: Future, skip: bool) -> Table | None:
        try:
            return _ready(name, call, self._deadline)
        except RewardFailure as failure:
            if not skip:
                raise
            if failure.shown and name not in self._shown:
                self._shown.add(name)  # one of many equal tracebacks is enough
                print(failure.shown, file=sys.stderr)
            print(f"skipped: {failure}", file=sys.stderr, flush=True)
            return None


def try_out(
    rewards: Mapping[str, Reward],
    prompts: Mapping[str, Sequence[Prompt]],
    size: tuple[int, int],
    deadline: float,
) -> dict[str, Table]:
    """What each reward measures of two random images; the rewards run one by one.

    The images have the first and the last of the reward's prompts, or the first one
    twice if it compares the images of a prompt. RewardFailure as in `Scorer.finish`.
    Here rewards on the device have a thread too, as no other program is started.
    """
    images = np.random.default_rng(0).random((2, *size, 3), np.float32)
    tables = {}
    for name, reward in rewards.items():
        first, last = prompts[name][0], prompts[name][-1]
        two = [first, first] if getattr(reward, "by_group", False) else [first, last]
        line = _Line(name)
        call = line.submit(functools.partial(_score, name, reward, images, two))
        _wait([call], deadline, False)
        tables[name] = _ready(name, call, deadline)
        _finite(name, tables[name][name], skip=False)
    return tables


def _wait(
    calls: Sequence[Future],
    deadline: float,
    for_all: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Waits for the calls; unless `for_all`, raises the first failure at once."""
    until = "ALL_COMPLETED" if for_all else "FIRST_EXCEPTION"
    end = time.monotonic() + min(deadline, threading.TIMEOUT_MAX)
    while True:
        check()
        left = max(0.0, end - time.monotonic())
        done, waiting = concurrent.futures.wait(calls, min(_LOOK, left), until)
        failures = [call.exception() for call in calls if call in done]
        for failure in failures:
            if failure and not for_all:
                raise failure
        if not waiting or not left:
            return


def _ready(name: str, call: Future, deadline: float) -> Table:
    """The result of a call that was waited for."""
    if call.done() and not call.cancelled():
        return call.result()
    call.cancel()  # in case it is still waiting for its turn
    guard.put_back()  # undoes what a call that hangs has changed
    raise RewardFailure(
        f"reward.{name}: no scores within {deadline:g} s of waiting (reward_deadline)"
    )


def _score(
    name: str, reward: Reward, images: Images, prompts: Sequence[Prompt]
) -> Table:
    """One reward of one batch; whatever goes wrong becomes a RewardFailure."""
    try:
        with jax.transfer_guard(
            "allow"
        ):  # the training loop's ban on transfers is not for rewards
            return _checked(name, reward(images, prompts), len(images))
    except RewardFailure:
        raise
    except UserError as error:
        text = str(error)
        raise RewardFailure(
            text if name in text else f"reward.{name}: {text}"
        ) from error
    except (
        BaseException
    ) as error:  # also SystemExit, which would end the thread silently
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and not isinstance(error, Exception):
            raise  # what our own signals raise
        raise RewardFailure(f"reward.{name}: {guard.described(error)}") from error


class _Line:
    """A queue of calls with one thread, which does not keep the process alive."""

    def __init__(self, name: str):
        self._name = name
        self._waiting: queue.SimpleQueue | None = None

    def submit(self, call: Callable[[], Table]) -> Future:
        if self._waiting is None:
            self._waiting = queue.SimpleQueue()
            weakref.finalize(self, self._waiting.put, None)
            threading.Thread(
                target=_serve, args=(self._waiting,), name=self._name, daemon=True
            ).start()
        future: Future = Future()
        self._waiting.put((future, call))
        return future


def _serve(waiting: queue.SimpleQueue) -> None:
    while (entry := waiting.get()) is not None:
        future, call = entry
        if future.set_running_or_notify_cancel():
            _run(future, call)


def _done(call: Callable[[], Table]) -> Future:
    future: Future = Future()
    _run(future, call)
    return future


def _run(future: Future, call: Callable[[], Table]) -> None:
    try:
        future.set_result(call())
    except RewardFailure as error:
        future.set_exception(error)


def _checked(name: str, measured: Any, count: int) -> Table:
    """What the reward returned, as arrays; RewardFailure if it is no such table."""
    if not isinstance(measured, Mapping) or name not in measured:
        keys = list(measured) if isinstance(measured, Mapping) else measured
        shown = guard.one_line(keys)[:80]
        raise RewardFailure(
            f"reward.{name}: returns {shown}: must return a dict with {name}"
        )
    table = {key: returned.array(values) for key, values in measured.items()}
    for key, values in table.items():
        if values.shape != (count,) or values.dtype.kind not in "fiub":
            raise RewardFailure(
                f"reward.{name}: {key} of {count} images is {values.dtype} of shape "
                f"{values.shape}: must be one number per image"
            )
    return table


def _joined(name: str, parts: Sequence[Table | None], sizes: Sequence[int]) -> Table:
    """One table of all batches; NaN where a batch has none."""
    tables = [part for part in parts if part is not None]
    keys = list(tables[0]) if tables else [name]
    if any(set(table) != set(keys) for table in tables):
        raise RewardFailure(f"reward.{name}: measures other things in every batch")
    return {
        key: np.concatenate(
            [
                np.full(size, np.nan, np.float32) if part is None else part[key]
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for key in keys
    }


def _finite(name: str, values: np.ndarray, skip: bool) -> np.ndarray:
    """RewardFailure for a score that is no number; with `skip` it becomes NaN."""
    bad = ~(np.abs(values.astype(np.float64)) <= LARGEST)
    if not bad.any():
        return values
    if not skip:
        first = np.flatnonzero(bad)[0]
        raise RewardFailure(
            f"reward.{name}: {values[first]:g} of sample {first}: must be finite, and at "
            f"most {LARGEST:g} in size"
        )
    return np.where(bad, np.nan, values)
