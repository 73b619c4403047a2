"""The processes of a run, one a host: what they agree on, and what ends them together.

JAX's own runtime joins them (`jax.distributed`): it carries what devices exchange, and a
store of keys and values on process 0. Here that store carries the few things that hosts
must tell each other: what a step gave on each of them, that one has failed or was asked
to stop, and that all are still there.

A run of one process does none of it: `together` is a plain call then.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
from flax import serialization
from jax._src import clusters, distributed  # the public module cannot be asked

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import environment, stopping
from flowgrpo_jax.runtime.stopping import Stopped
from flowgrpo_jax.runtime.workdir import flat

Value = TypeVar("Value")

JOINING = 45  # seconds within which all processes must come
_BEAT = 1.0  # seconds between two signs of life
_PATIENCE = 60.0  # seconds without one, after which a process counts as lost
_LAST_WORDS = 3 * _BEAT  # process 0 stays so long after an error: it holds the store
_READ = 5_000  # milliseconds of one wait for a value
# A lost process ends the others as a preemption does, so that launchers start them again.
_LOST = 128 + signal.SIGTERM


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a process belongs: host:port of process 0, how many, which one."""

    coordinator: str
    count: int
    index: int


def given(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Address | None:
    """The place that flags name, or that the cluster tells; None for a run alone.

    JAX knows TPU pods, SLURM, JobSets of Kubernetes and Open MPI. UserError for flags
    that do not go together, or for a name that does not resolve.
    """
    flags = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if coordinator is None and num_processes is None and process_id is None:
        coordinator, num_processes, process_id, _ = (
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, (), None, JOINING
            )
        )
        if coordinator is None or num_processes in (None, 1):
            return None
    elif missing:
        raise UserError(
            f"--{missing[0]}: missing: --coordinator, --num_processes and --process_id "
            "go together"
        )
    assert coordinator and num_processes is not None and process_id is not None
    host, colon, port = coordinator.rpartition(":")
    if not (colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator: {coordinator}: must be HOST:PORT of process 0")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id: {process_id}: must be 0 to {num_processes - 1}: there are "
            f"{num_processes} processes"
        )
    if num_processes == 1:
        return None
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(
            f"--coordinator: {host}: the name does not resolve on {socket.gethostname()}"
            f" ({error.strerror or error}): give an address, or a name that all hosts "
            "know"
        ) from error
    return Address(coordinator, num_processes, process_id)


class _Cluster:
    """The processes that have joined, seen from one of them."""

    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.names = [f"process {k}" for k in range(count)]
        self._turn = 0
        self._closed = threading.Event()
        self._met_error = False  # of the runtime, which all may meet at once
        self._watching = threading.Thread(target=self._watch, daemon=True)

    # -- what all of them tell each other ---------------------------------------------

    def exchange(self, make: Callable[[], Any]) -> list[Any]:
        """See `together`."""
        mine: Exception | None = None
        try:
            told = {"value": make()}
        except (UserError, Stopped) as error:
            # A signal may end what a reward has started, too: then it is no failure.
            mine = Stopped() if stopping.is_requested() else error
            told = {"error": type(mine).__name__, "line": str(mine)}
        answers = self._all(told)
        for kind in (Stopped.__name__, None):  # being asked to stop is no failure
            for index, answer in enumerate(answers):
                if "error" in answer and kind in (answer["error"], None):
                    if index == self.index and mine is not None:
                        raise mine
                    raise _rebuilt(answer, self.names[index])
        return [answer["value"] for answer in answers]

    def _all(self, told: Mapping[str, Any]) -> list[Any]:
        """What every process told in this turn, in their order.

        The first one reads them all, and what it then writes is what the others read:
        so the work of the store grows with the number of processes, not its square.
        """
        self._turn += 1
        turn, mine = f"turn/{self._turn}", _packed(told)
        if self.index == 0:
            parts = [self._read(f"{turn}/{k}") for k in range(1, self.count)]
            answers = _packed({"all": [mine, *parts]})
            self.client.key_value_set_bytes(f"{turn}/all", answers)
            # All have come to this turn, so all have read that of the last one.
            self.client.key_value_delete(f"turn/{self._turn - 1}")
        else:
            self.client.key_value_set_bytes(f"{turn}/{self.index}", mine)
            answers = self._read(f"{turn}/all")
        parts = serialization.msgpack_restore(answers)["all"]
        return [serialization.msgpack_restore(part) for part in parts]

    def _read(self, key: str) -> bytes:
        """Waits for a value; the thread that watches ends a wait for a lost process."""
        while True:
            try:
                return self.client.blocking_key_value_get_bytes(key, _READ)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # -- the ends ---------------------------------------------------------------------

    def start(self) -> None:
        """Learn the others' names, and watch them from here on."""
        hosts = self._all({"host": socket.gethostname()})
        self.names = [
            f"{name} on {one['host']}"
            for name, one in zip(self.names, hosts, strict=True)
        ]
        self._watching.start()
        stopping.last_words = self.tell_the_others
        _on_abort(self._lost_line(0))

    def close(self) -> None:
        """Leave together, once all have come so far."""
        self.exchange(lambda: None)
        self._closed.set()
        self._watching.join()
        stopping.last_words = stopping.nothing
        _on_abort("")
        jax.distributed.shutdown()

    def tell_the_others(self, status: int, line: str) -> None:
        """Say that this process ends before the run does, and why."""
        if self._closed.is_set():
            return
        self._closed.set()
        told = {"status": status, "line": line, "met_error": self._met_error}
        with contextlib.suppress(Exception):  # the store may be gone
            self.client.key_value_set_bytes(f"left/{self.index}", _packed(told))
            if self.index == 0:
                time.sleep(_LAST_WORDS)

    def wait_for_news(self) -> None:
        """After an error of the runtime: if a process is gone, this one ends by that.

        Collectives fail as soon as one has gone, and who it was is known a little later.
        Returns if nobody is: all have met an error then, or the time is up.
        """
        until = time.monotonic() + _PATIENCE + 10
        self._met_error = True
        with contextlib.suppress(Exception):  # the store may be gone
            self.client.key_value_set(f"error/{self.index}", "", allow_overwrite=True)
            while self._watching.is_alive() and time.monotonic() < until:
                if len(self.client.key_value_dir_get("error/")) == self.count:
                    return
                self._watching.join(_BEAT)
            return
        self._watching.join(_PATIENCE)

    def _watch(self) -> None:
        """Gives signs of life, and ends this process once another one has gone."""
        seen: dict[int, tuple[str, float]] = {}
        beat, before = 0, time.monotonic()
        while not self._closed.wait(_BEAT):
            beat, now = beat + 1, time.monotonic()
            try:
                self.client.key_value_set(
                    f"alive/{self.index}", str(beat), allow_overwrite=True
                )
                left = self.client.key_value_dir_get_bytes("left/")
                alive = dict(self.client.key_value_dir_get("alive/"))
            except Exception:  # the store is gone; what that raises depends on when
                if self._closed.wait(_BEAT):
                    return
                self._end(_LOST, self._lost_line(0))
            for key, told in left:
                self._end_with(int(key.rpartition("/")[2]), told)
            if now - before > _PATIENCE / 2:
                seen.clear()  # this process slept, and knows nothing of the others
            before = now
            for index in range(self.count):
                sign = alive.get(f"alive/{index}", "")
                if seen.get(index, ("none", 0.0))[0] != sign:
                    seen[index] = sign, now
                elif now - seen[index][1] > _PATIENCE:
                    self._end(_LOST, self._lost_line(index))

    def _lost_line(self, index: int) -> str:
        return (
            f"{self.names[index]} is gone: nothing was heard of it any more: start the "
            "same command again on all hosts, and the run goes on from its last "
            "checkpoint"
        )

    def _end_with(self, index: int, words: bytes) -> None:
        told = serialization.msgpack_restore(words)
        if self._met_error and told["met_error"]:
            return  # each of them tells its own
        if index != self.index:
            self._end(told["status"], f"{self.names[index]} has ended: {told['line']}")

    def _end(self, status: int, line: str) -> None:
        """Ends this process; the others come to it by themselves."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self.index == 0:
            time.sleep(_LAST_WORDS)  # so that they do: the store ends with this process
        stopping.leave(status, f"error: {line}")


_joined: _Cluster | None = None


@contextlib.contextmanager
def joined(address: Address | None) -> Iterator[None]:
    """Within it this process is one of a run of several, unless `address` is None.

    An error that ends one of them ends all, with its line. UserError, within a minute,
    if they do not come, if another program has the port, or if their versions differ.
    """
    global _joined
    if address is None:
        yield
        return
    cluster = _Cluster(_connect(address), address.index, address.count)
    cluster.start()
    _joined = cluster
    try:
        same({"version": environment.versions()})
        yield
        cluster.close()
    except BaseException as error:
        if not isinstance(error, UserError | Stopped | SystemExit | KeyboardInterrupt):
            cluster.wait_for_news()
        status = 2 if isinstance(error, UserError) else 1
        cluster.tell_the_others(status, " ".join(str(error).split()) or repr(error))
        raise
    finally:
        _joined = None


def _connect(address: Address) -> Any:
    """Joins the others; UserError if not all of them come in time."""
    if address.index == 0:
        _check_port(address.coordinator)
    # Its handler of SIGTERM would replace ours, below Python.
    jax.config.update("jax_enable_preemption_service", False)
    line = (
        f"--coordinator: {address.coordinator}: not all of {address.count} processes "
        f"came there within {JOINING} s (this is process {address.index} on "
        f"{socket.gethostname()}): start the same command on every host, each with its "
        "own --process_id"
    )
    _on_abort(line, status=2)  # JAX raises nothing where one does not come
    try:
        jax.distributed.initialize(
            coordinator_address=address.coordinator,
            num_processes=address.count,
            process_id=address.index,
            local_device_ids=_own_devices(),
            cluster_detection_method="deactivate",
            initialization_timeout=JOINING,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(line) from error
    return distributed.global_state.client


def _check_port(coordinator: str) -> None:
    """UserError if another program listens on the port that process 0 is to have."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator: {coordinator}: port {port} is taken on "
                f"{socket.gethostname()}: give another one on all hosts"
            ) from error


def _own_devices() -> list[int] | None:
    """With several tasks a node, SLURM gives each one GPU; else a process has all.

    JAX would take one where SLURM starts one task a node too.
    """
    several = {"SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"}
    if not several <= os.environ.keys():
        return None
    tasks, nodes = (int(os.environ[f"SLURM_STEP_NUM_{x}"]) for x in ("TASKS", "NODES"))
    return [int(os.environ["SLURM_LOCALID"])] if tasks > nodes else None


def _packed(told: Mapping[str, Any]) -> bytes:
    """Bytes of it; "in place", since a copy by flax has its names in another order."""
    return serialization.msgpack_serialize(dict(told), in_place=True)


def _rebuilt(answer: Mapping[str, str], name: str) -> Exception:
    """The error that another process told of, as that of this one."""
    if answer["error"] == Stopped.__name__:
        return Stopped()
    kinds = [UserError]
    for kind in kinds:  # and all that are made of it
        if kind.__name__ == answer["error"]:
            return kind(f"{answer['line']} ({name})")
        kinds += kind.__subclasses__()
    return UserError(f"{answer['line']} ({name})")


# -- what the rest of the package asks -------------------------------------------------


def count() -> int:
    """How many processes there are."""
    return _joined.count if _joined else 1


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return _joined is None or _joined.index == 0


def index() -> int:
    """Which process this is."""
    return _joined.index if _joined else 0


def together(make: Callable[[], Value]) -> list[Value]:
    """What `make` gives on every process, in their order; all must call it.

    Values are numbers, texts, arrays, and lists and dicts of them. A UserError on one
    process, or that it was asked to stop (`Stopped`), is raised on all.
    """
    return [make()] if _joined is None else _joined.exchange(make)


def first(make: Callable[[], Value]) -> Value:
    """What `make` gives on process 0, where alone it is called."""
    return cast(Value, together(lambda: make() if is_first() else None)[0])


def same(values: Mapping[str, Any]) -> None:
    """UserError if processes differ in any of these values, which may be nested.

    The line names the key and the host. They are compared as texts.
    """
    if _joined is None:
        return
    told = {key: str(value) for key, value in flat(values).items()}
    answers = together(lambda: told)
    for name, answer in zip(_joined.names, answers, strict=True):
        for key in [*answers[0], *(key for key in answer if key not in answers[0])]:
            there, here = answer.get(key, "nothing"), answers[0].get(key, "nothing")
            if there != here:
                raise UserError(
                    f"{key}: {there} on {name}, {here} on {_joined.names[0]}: must be "
                    "the same on all hosts"
                )


# -- the end of process 0 ---------------------------------------------------------------


def _on_abort(line: str, status: int = _LOST) -> None:
    """JAX aborts a process as soon as process 0 is gone, from a thread of its own.

    No handler of Python runs then: this one, of C, says why before the end. No line: no
    handler.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler: Any = _abort_handler(line, status) if line else None
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


@functools.cache  # kept, since C holds its address
def _abort_handler(line: str, status: int) -> Any:
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number: int) -> None:
        del number
        stopping.leave(status, f"error: {line}")

    return handle
