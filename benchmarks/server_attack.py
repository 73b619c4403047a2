"""The reward server under attack: who is served, what it costs, how it ends.

    python -m benchmarks.server_attack --write

Beside 500 idle connections, 200 that drip their headers or bodies, and a stream of
bombs by header, 32 clients ask for the scores of 8 images several times. Then SIGTERM,
and in a server of its own a reward that hangs and two signals. All of it on this
machine's loopback, for about a minute. Exit code 1 if a bar is missed.
"""

import argparse
import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
from PIL import Image

from benchmarks import sections
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.service import wire
from flowgrpo_jax.rewards.service.client import Remote

NAME = "jpeg_compressibility"
MEMORY_MB, ENDS_S = 600, 10.0  # the bars
_HANGS = "import time\n\ndef hangs(images, prompts):\n    time.sleep(3600)\n"


class Server:
    """The command, in a process of its own."""

    def __init__(self, rewards: str, folder: str = ".", *flags: str):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flowgrpo_jax.rewards.server", "--port=0"),
                f"--rewards={rewards}",
                *flags,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{os.getcwd()}:{folder}"},
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.told: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.told += iter(self.process.stderr.readline, "")

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1000

    def ends(self, *signals: int, pause: float = 0.3) -> float:
        """Seconds from the last of these signals to the end."""
        for number in signals:
            time.sleep(pause)
            self.process.send_signal(number)
        begin = time.monotonic()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
        return time.monotonic() - begin


def connect(port: int, first: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(first)
    return connection


def drip(connections: list[socket.socket], over: threading.Event) -> None:
    """A byte on each of them every second."""
    while not over.wait(1.0):
        for connection in connections:
            try:
                connection.send(b"a")
            except OSError:  # the server has had enough of it
                pass


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of black pixels that says it is this large, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bombs() -> dict[str, tuple[bytes, str]]:
    """Bodies that are small and ask for a lot."""

    def asks(*files: bytes, **changes) -> bytes:
        body = {"images": list(files), "prompts": ["a"] * len(files)} | changes
        return wire.dump(body, "json")

    black = io.BytesIO()
    Image.new("L", (4096, 4096)).save(black, "png")
    long, emoji = b"a" * (20 << 20), "😀".encode()
    full = io.BytesIO()
    Image.new("L", (2048, 2048)).save(full, "png")
    return {
        "PNG of 60000 x 60000": (asks(png(60000, 60000)), "json"),
        "PNG of 1 x 67108864": (asks(png(1, 1 << 26)), "json"),
        "PNG of 4096 x 4096": (asks(black.getvalue()), "json"),
        "20000 names": (asks(full.getvalue(), rewards=[NAME] * 20000), "json"),
        "list of 2^32": (b"\xdd\xff\xff\xff\xff", "msgpack"),
        "lists in lists of 2^26": (b"\xdd\x03\xff\xff\xff" * 500, "msgpack"),
        "8 million empty lists": (
            b"\xdd\x00\x80\x00\x00" + b"\x90" * (8 << 20),
            "msgpack",
        ),
        "4 million empty objects": (b"[" + b"{}," * (4 << 20) + b"{}]", "json"),
        "100000 brackets": (b"[" * 100_000, "json"),
        "300 images in one": (asks(*[png(2048, 2048)] * 300), "json"),
        "2048 x 2048, as large as may be": (asks(full.getvalue()), "json"),
        "20 MB of text": (b'{"images": ["%s"]}' % long, "json"),
        "20 MB with one emoji": (b'{"images": ["%s%s"]}' % (emoji, long), "json"),
        "the same as msgpack": (
            msgpack.packb({"images": [(emoji + long).decode()]}),
            "msgpack",
        ),
    }


def post(url: str, data: bytes, encoding: str) -> int:
    """The status of the answer; 0 for none."""
    headers = {"Content-Type": wire.TYPES[encoding]}
    request = urllib.request.Request(f"{url}/score", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def throw(url: str, over: threading.Event, statuses: dict[str, list[int]]) -> None:
    made = bombs()
    while not over.is_set():
        for name, (data, encoding) in made.items():
            if not over.is_set():
                statuses.setdefault(name, []).append(post(url, data, encoding))


def ask(url: str, size: int, requests: int, seed: int) -> list[float]:
    """One client: the seconds of each of its calls; the scores must be right."""
    images = np.random.default_rng(seed).integers(0, 256, (8, size, size, 3)) / 255
    images = images.astype(np.float32)
    prompts = [Prompt(f"prompt {n}", {"n": n}, n) for n in range(8)]
    remote = Remote(NAME, server=url, deadline=60.0, encoding="json")
    took = []
    for _ in range(requests):
        begin = time.monotonic()
        scores = remote(images, prompts)[NAME]
        took.append(time.monotonic() - begin)
        assert scores.shape == (8,) and (scores < 0).all()
    return took


def healthy(url: str, over: threading.Event, took: list[float]) -> None:
    while not over.wait(0.5):
        begin = time.monotonic()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
                assert response.status == 200
        except OSError:
            if over.is_set():
                return
            raise
        took.append(time.monotonic() - begin)


def crowd(flags: argparse.Namespace) -> tuple[list[str], bool]:
    server, over = Server(NAME), threading.Event()
    while not any("ready" in line for line in server.told):
        time.sleep(0.1)
    start_mb = server.peak_mb()
    connections = [connect(server.port) for _ in range(flags.idle)]
    half = b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: "
    body = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    body += b"Content-Length: 20000000\r\n\r\n" + b" " * 400_000
    dripping = []
    for n in range(flags.dripping):
        dripping.append(connect(server.port, half if n % 2 else body))
    statuses: dict[str, list[int]] = {}
    health: list[float] = []
    thrower = threading.Thread(target=throw, args=(server.url, over, statuses))
    for thread in (
        thrower,
        threading.Thread(target=drip, args=(dripping, over), daemon=True),
        threading.Thread(target=healthy, args=(server.url, over, health), daemon=True),
    ):
        thread.start()
    with ThreadPoolExecutor(flags.clients) as threads:
        calls = [
            threads.submit(ask, server.url, flags.size, flags.requests, seed)
            for seed in range(flags.clients)
        ]
        took = [call.result() for call in calls if call.exception() is None]
        failed = [str(e) for call in calls if (e := call.exception()) is not None]
    while len(statuses) < len(bombs()):
        time.sleep(0.1)
    over.set()
    thrower.join()
    peak = server.peak_mb()
    connections += [connect(server.port) for _ in range(50)]
    dripping += [connect(server.port, part) for part in (half, body) * 50]
    over = threading.Event()
    threading.Thread(target=drip, args=(dripping, over), daemon=True).start()
    ended = server.ends(signal.SIGTERM)
    over.set()
    code = server.process.returncode
    tracebacks = sum("Traceback" in line for line in server.told)
    slowest = max((max(one) for one in took), default=float("nan"))
    told = ", ".join(
        f"{name}: {'/'.join(map(str, sorted(set(codes))))}"
        for name, codes in statuses.items()
    )
    print("\n".join(failed), told, "".join(server.told), sep="\n", file=sys.stderr)
    rows = [
        f"| clients served, of {flags.clients}, {flags.requests} requests of 8 images "
        f"of {flags.size} pixels each | {len(took)} | all |",
        f"| slowest request | {slowest:.2f} s | |",
        f"| slowest answer of /health | {max(health):.2f} s | |",
        f"| bombs thrown | {sum(map(len, statuses.values()))} | |",
        f"| bombs answered by 500, or not at all | "
        f"{sum(code in (0, 500) for codes in statuses.values() for code in codes)} "
        "| 0 |",
        f"| memory of the server at the start | {start_mb:.0f} MB | |",
        f"| its peak (VmHWM) | {peak:.0f} MB | {MEMORY_MB} MB |",
        f"| tracebacks it printed | {tracebacks} | 0 |",
        f"| SIGTERM to its end, exit code {code} | {ended:.1f} s | {ENDS_S:g} s |",
    ]
    right = len(took) == flags.clients and peak <= MEMORY_MB and ended <= ENDS_S
    bad = {0, 500} & {code for codes in statuses.values() for code in codes}
    return rows, right and not tracebacks and not bad and code == 0


def hanging(*signals: int) -> float:
    """Seconds that a server takes to end while a reward of it hangs for an hour."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hanging.py").write_text(_HANGS)
        server = Server("hanging.hangs", folder)
        while not any("ready" in line for line in server.told):
            time.sleep(0.1)
        image = wire.image_file(np.zeros((8, 8, 3), np.float32))
        body = wire.dump({"images": [image], "prompts": ["a"]}, "json")
        given = (server.url, body, "json")
        threading.Thread(target=post, args=given, daemon=True).start()
        connection = connect(server.port)
        ended = server.ends(*signals, pause=1.0)
        connection.close()
        return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument("--dripping", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--write", action="store_true", help="to docs/reliability.md")
    flags = parser.parse_args()
    rows, right = crowd(flags)
    once, twice = hanging(signal.SIGTERM), hanging(signal.SIGTERM, signal.SIGTERM)
    rows += [
        f"| SIGTERM to its end, while a reward hangs | {once:.1f} s | {ENDS_S:g} s |",
        f"| a second SIGTERM to its end | {twice:.1f} s | 2 s |",
    ]
    right = right and once <= ENDS_S and twice <= 2.0
    title = f"{flags.idle} idle and {flags.dripping} dripping connections, bombs beside"
    table = "\n".join([f"| {title} | | bar |", "|---|---|---|", *rows])
    print(table)
    if flags.write:
        command = "python -m benchmarks.server_attack --write"
        sections.write("The reward server under attack", command, table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
