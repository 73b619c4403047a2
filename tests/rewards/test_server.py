"""The reward server: many clients, wrong requests, and nothing of theirs executed."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import server as servers
from flowgrpo_jax.rewards.server import Limits, RewardServer
from flowgrpo_jax.rewards.service import limits, wire
from flowgrpo_jax.rewards.service.client import Remote

IMAGES = (
    np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.float32) / 255
)
PROMPTS = [Prompt(f"prompt {n}", {"tag": "a", "n": n}, n) for n in range(5)]
LIMITS = Limits(body=1 << 20, pixels=1 << 14, requests=12, seconds=5.0)


def bright(images, prompts):
    number = [float(prompt.metadata["n"]) for prompt in prompts]
    return {"bright": images.mean(axis=(1, 2, 3)), "number": np.array(number)}


def broken(images, prompts):
    raise RuntimeError("no memory\nleft")


@contextlib.contextmanager
def serving(rewards=None, token="", limits=LIMITS):
    with RewardServer(("127.0.0.1", 0), token, limits) as server:
        if rewards is not None:
            server.load(rewards)
        yield server


@pytest.fixture(scope="module")
def server():
    with serving({"bright": bright, "broken": broken}, token="secret") as made:
        yield made


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def body(**changes):
    files = [wire.image_file(image) for image in IMAGES[:2]]
    prompts = wire.prompt_values(PROMPTS[:2])
    return {"rewards": ["bright"], "images": files, "prompts": prompts} | changes


def ask(server, method, path, data=None, kind="application/json", token="secret"):
    """(status, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def raw(server, text):
    """The first line that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").readline().decode()


@pytest.mark.parametrize("options", [{}, {"encoding": "msgpack", "batch": 2}])
def test_client_and_server_give_what_the_reward_gives(server, monkeypatch, options):
    """Oracle: the reward itself, called here; images are exact in 8 bits."""
    monkeypatch.setenv("A_TOKEN", "secret")
    remote = Remote("bright", server=url(server), token_env="A_TOKEN", **options)
    scores, here = remote(IMAGES, PROMPTS), bright(IMAGES, PROMPTS)
    assert list(scores) == list(here)
    for name, values in here.items():
        np.testing.assert_array_equal(scores[name], values)


def test_eight_clients_at_once(monkeypatch):
    """Oracle: the reward itself for each of 40 requests, and a count: never two calls
    at once, since a scorer has one thread."""
    inside, most = [], []

    def alone(images, prompts):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return bright(images, prompts)

    with serving({"bright": alone}) as made:
        remotes = [Remote("bright", server=url(made)) for _ in range(8)]

        def client(number):
            for turn in range(5):
                rows = [(number + turn + n) % 5 for n in range(3)]
                prompts = [PROMPTS[row] for row in rows]
                scores = remotes[number](IMAGES[rows], prompts)
                here = bright(IMAGES[rows], prompts)
                np.testing.assert_array_equal(scores["bright"], here["bright"])
                np.testing.assert_array_equal(scores["number"], rows)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(client, range(8)))
    assert len(most) == 40 and max(most) == 1


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_requests(server, tmp_path):
    """Oracle: the status codes of RFC 9110, by hand; afterwards it still serves."""
    good = wire.dump(body(), "json")
    evil = pickle.dumps(Evil(tmp_path / "made"))
    deep = b"[" * 100_000
    for wanted, request in {
        401: ("POST", "/score", good, "application/json", "guess"),
        404: ("GET", "/etc/passwd"),
        405: ("PUT", "/score", good),
        415: ("POST", "/score", good, "application/x-pickle"),
    }.items():
        status, answer = ask(server, *request)
        assert status == wanted and list(answer) == ["error"]
    for kind in ("application/json", "application/msgpack"):
        for junk in (evil, deep, b"", b"\x00\xff", good[:-9]):
            assert ask(server, "POST", "/score", junk, kind)[0] == 400, junk[:20]
    assert not (tmp_path / "made").exists()
    assert ask(server, "POST", "/score", good)[0] == 200


@pytest.mark.parametrize(
    "status, line, changes",
    [
        (400, "images: must be a list", {"images": 5}),
        (400, "images: must be a list", {"images": []}),
        (400, "images: 0: is no PNG or JPEG", {"images": [b"GIF89a"]}),
        (400, "images: 0: must be bytes", {"images": ["?"]}),
        (400, "prompts: must be a list, one for each of 2", {"prompts": ["a"]}),
        (400, "prompts: 1: must have a text", {"prompts": ["a", {"metadata": 1}]}),
        (400, "rewards: must be a list", {"rewards": "bright"}),
        (404, "rewards: os.system: not among bright", {"rewards": ["os.system"]}),
        (404, "rewards: {}: not among", {"rewards": [{}]}),
        (404, "rewards: [[[", {"rewards": [json.loads("[" * 800 + "]" * 800)]}),
        (400, "rewards: bright: must stand there once", {"rewards": ["bright"] * 2}),
        (400, "rewards: bright: must stand", {"rewards": ["bright"] * 20000}),
        (400, "prompts: 0: holds half of", {"prompts": ["\ud83d", "a"]}),
        (
            400,
            "prompts: 1: holds half of",
            {"prompts": ["a", {"text": "", "metadata": {"\ud83d": 1}}]},
        ),
        (500, "reward.broken: RuntimeError: no memory left", {"rewards": ["broken"]}),
    ],
)
def test_wrong_bodies_are_one_line(server, status, line, changes, capfd):
    """Oracle: the line, by hand; no traceback goes to the client."""
    got, answer = ask(server, "POST", "/score", wire.dump(body(**changes), "json"))
    assert got == status and answer["error"].startswith(line), answer
    assert "\n" not in answer["error"] and "Traceback" not in answer["error"]


def bomb():
    """A small file of 4000 x 4000 pixels."""
    file = io.BytesIO()
    Image.new("1", (4000, 4000)).save(file, "png")
    return file.getvalue()


def test_too_large_is_refused_before_it_is_unpacked(server):
    """Oracle: status codes; 65 images of 16 x 16 are 65 * 256 > 2**14 pixels."""
    for files in ([bomb()], [wire.image_file(np.zeros((16, 16, 3)))] * 65):
        data = wire.dump({"images": files, "prompts": ["a"] * len(files)}, "json")
        status, answer = ask(server, "POST", "/score", data)
        assert status == 413 and "at most 16384 pixels" in answer["error"]
    head = b"POST /score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
    kind = b"Content-Type: application/json\r\n"
    sized = head + kind + b"Content-Length: %d\r\n\r\n"
    assert " 413 " in raw(server, sized % (1 << 40))
    assert " 411 " in raw(server, head + kind + b"Transfer-Encoding: chunked\r\n\r\n")
    assert " 400 " in raw(server, head + kind + b"Content-Length: -5\r\n\r\n")
    assert " 400 " in raw(server, sized % 50 + b"{}")  # shorter than it says
    assert " 400 " in raw(server, b"\x16\x03\x01 rubbish\r\n\r\n")
    assert ask(server, "POST", "/score", b"x" * (2 << 20))[0] == 413
    assert ask(server, "GET", "/health")[0] == 200


def test_not_ready_and_busy():
    """Oracle: 503 before rewards are loaded, and when every slot is taken."""
    go = threading.Event()

    def waits(images, prompts):
        go.wait(10)
        return bright(images, prompts)

    with serving(limits=Limits(requests=1)) as made:
        good = wire.dump(body(), "json")
        for request in (("GET", "/health"), ("GET", "/rewards")):
            assert ask(made, *request)[0] == 503
        assert ask(made, "POST", "/score", good)[0] == 503
        made.load({"bright": waits})
        assert ask(made, "GET", "/rewards", token="none is needed")[0] == 200
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(ask, made, "POST", "/score", good)
            while not made._routes._asked:
                time.sleep(0.01)
            status, answer = ask(made, "POST", "/score", good)
            assert (status, answer["error"]) == (503, "busy with 1 requests")
            go.set()
            assert first.result()[0] == 200


def test_flags_are_checked(monkeypatch):
    """Oracle: the lines, by hand."""
    with pytest.raises(UserError, match="^--host: 0.0.0.0: without --token_env"):
        servers.main(["--rewards=ocr", "--host=0.0.0.0"])
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(UserError, match="^--token_env: NO_SUCH_TOKEN: "):
        servers.main(["--rewards=ocr", "--token_env=NO_SUCH_TOKEN"])


def lines(connection, seconds=10):
    """All that comes back on it, until the server closes it."""
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionResetError):
        return connection.makefile("rb").read().decode()
    return ""


def open_to(server, first=b""):
    connection = socket.create_connection(("127.0.0.1", server.server_port), 10)
    connection.sendall(first)
    return connection


HALF_HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: "
HALF_BODY = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
HALF_BODY += b"Content-Length: 99999\r\n\r\n" + b"[" * 9000


@pytest.mark.parametrize("begin", [b"", b"G", b"GET / HTTP/1.1\r\n", HALF_HEAD])
def test_heads_that_drip_are_cut_off(begin):
    """Oracle: the status of RFC 9110, and that the connection ends at all: there is a
    byte in time, always, so no time-out between bytes would ever end it."""
    with serving({"bright": bright}, limits=Limits(head=0.4)) as made:
        with open_to(made, begin) as connection:
            over = threading.Event()

            def drip():
                with contextlib.suppress(OSError):
                    while not over.wait(0.05):
                        connection.send(b"a")

            thread = threading.Thread(target=drip)
            thread.start()
            told = lines(connection)
            over.set()
            thread.join()
        assert not told or " 408 " in told
        assert ask(made, "GET", "/health")[0] == 200


def test_bodies_that_drip_are_cut_off_and_take_no_slot():
    """Oracle: with one slot, a request beside five that have not come."""
    with serving({"bright": bright}, limits=Limits(requests=1, seconds=1.0)) as made:
        slow = [open_to(made, HALF_BODY) for _ in range(5)]
        good = wire.dump(body(), "json")
        assert ask(made, "POST", "/score", good)[0] == 200
        assert all(" 408 " in lines(connection) for connection in slow)


def test_bodies_are_limited_together():
    """Oracle: the oldest of those that are coming is given up, 503, the next served."""
    good = wire.dump(body(), "json")
    limits = Limits(bodies=9000 + len(good), seconds=60.0)
    with serving({"bright": bright}, limits=limits) as made:
        slow = [open_to(made, HALF_BODY)]
        while made._routes._bodies._held < 9000:
            time.sleep(0.01)
        slow.append(open_to(made, HALF_BODY))
        assert ask(made, "POST", "/score", good)[0] == 200
        told = lines(slow[0])
        assert " 503 " in told and "retry-after: 1" in told.lower()
        slow[1].close()


def test_connections_are_limited():
    """Oracle: counts; the oldest idle ones go, those that ask are served."""
    limits = Limits(connections=4)
    with serving({"bright": bright}, limits=limits) as made:
        idle = [open_to(made, first) for first in (b"", HALF_HEAD, HALF_BODY) * 5]
        assert ask(made, "GET", "/health")[0] == 200
        assert ask(made, "POST", "/score", wire.dump(body(), "json"))[0] == 200
        assert all(lines(connection) == "" for connection in idle[:11])
        assert len(made._server.server_state.connections) <= 4


def test_it_ends_with_clients_that_do_not():
    """Oracle: what was begun is answered; idle and dripping clients are not waited for,
    nor is a reward that hangs beyond the grace."""
    limits, go = Limits(grace=1.0), threading.Event()

    def slow(images, prompts):
        time.sleep(0.5)
        return {"slow": images.mean(axis=(1, 2, 3))}

    def hangs(images, prompts):
        go.wait(60)

    with ThreadPoolExecutor(2) as threads:
        with serving({"slow": slow, "hangs": hangs}, limits=limits) as made:
            held = [open_to(made, first) for first in (b"", HALF_HEAD, HALF_BODY) * 3]
            data = [wire.dump(body(rewards=[n]), "json") for n in ("slow", "hangs")]
            asked = [threads.submit(ask, made, "POST", "/score", one) for one in data]
            while made._routes._asked < 2:
                time.sleep(0.01)
            begin = time.monotonic()
        assert time.monotonic() - begin < 8
        assert not made._thread.is_alive()
        assert asked[0].result()[0] == 200
        assert asked[1].exception() or asked[1].result()[0] == 503
        go.set()
        del held


def png(width, height, depth=8, kind=0):
    """A small file that says it is this large."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    "status, line, file",
    [
        (400, "images: 0: Image size", png(60000, 60000)),
        (400, "images: 0: 1 x 67108864 pixels: a side", png(1, 1 << 26)),
        (400, "images: 0: 16385 x 2 pixels: a side", png(16385, 2)),
        (413, "images: 1 of 16384 x 4000 pixels", png(16384, 4000)),
        (400, "images: 0: I;16: must have 8 bits", png(8, 8, 16)),
        (400, "images: 0: cannot be read", png(8, 8)),
        (400, "images: 0: is no PNG", png(0, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_by_the_header_of_an_image(server, status, line, file):
    """Oracle: status and line, by hand."""
    data = wire.dump({"images": [file], "prompts": ["a"]}, "json")
    got, answer = ask(server, "POST", "/score", data)
    assert got == status and answer["error"].startswith(line), answer


@pytest.mark.parametrize(
    "encoding, data",
    [
        ("msgpack", b"\xdd\xff\xff\xff\xff"),
        ("msgpack", b"\xdf\xff\xff\xff\xff"),
        ("msgpack", b"\x81\xa1a\xdc\xff\xff" + b"\x90" * 70_000),
        ("msgpack", b"\xdd\x00\x00\xff\x00" * 1000),
        ("msgpack", b"\xdd\x00\x10\x00\x00" + b"\x80" * (1 << 20)),
        ("msgpack", b"\xdb\x00\x50\x00\x00" + b"a" * 0x500000),
        ("msgpack", b"\xc7\x00\xc6\xff\xff\xff\xff"),
        ("msgpack", b"\xd6\xff\x00\x00\x00\x00"),
        ("json", b"[" + b"[]," * 70_000 + b"[]]"),
        ("json", b'[{"a":{}' + b',"a":{}' * 70_000 + b"}]"),
        ("json", b"[" + b"1," * 70_000 + b"1]"),
        ("json", '["😀%s"]'.encode() % (b"a" * (5 << 20))),
    ],
)
def test_bombs_by_what_a_body_holds(encoding, data):
    """Oracle: refused, and less memory than the smallest of them would have made:
    70,000 lists are 4 MB."""
    tracemalloc.start()
    with pytest.raises(ValueError, match="^body: not .*(more than|must be plain)"):
        wire.load(data, encoding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_as_many_values_as_are_allowed():
    """Oracle: the library, on what is just within the limit and what is just beyond."""
    for encoding in wire.TYPES:
        for value in ([0] * 99, [[0] * 49] + [0] * 49, {"a": [1.5] * 98}, ["a"] * 99):
            data = wire.dump(value, encoding)
            assert wire.load(data, encoding, 101) == value
            with pytest.raises(ValueError, match="more than 90 values"):
                wire.load(data, encoding, 90)


@pytest.mark.parametrize(
    "head, status",
    [
        (b"Content-Length: %s" % (b"9" * 5000), 400),
        (b"Content-Length: %s" % (b"9" * 21), 400),
        (b"Content-Length: %s" % (b"9" * 20), 413),
        (b"Content-Length: +5", 400),
        (b"Content-Length: 5, 6", 400),
        (b"Content-Length: 5\r\nContent-Length: 6", 400),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", 411),
        (b"Content-Length: 5\r\nContent-Type: text/plain", 415),
        (b"Transfer-Encoding: gzip", 400),
        (b"X: " + b"a" * 100_000, 411),
        (b"X: \x00", 400),
        (b"no colon", 400),
        (b"Upgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 0", 400),
    ],
)
def test_heads_that_are_none(server, head, status, capfd):
    """Oracle: the status, by hand, and nothing printed."""
    first = b"POST /score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
    first += b"Content-Type: application/json\r\n" + head + b"\r\n\r\n"
    assert raw(server, first).split()[1:2] in ([str(status)], [])
    assert capfd.readouterr().err == ""
    assert ask(server, "GET", "/health")[0] == 200


def test_busy_says_when_to_come_again():
    with serving() as made:
        connection = http.client.HTTPConnection("127.0.0.1", made.server_port)
        connection.request("GET", "/health")
        assert connection.getresponse().headers["Retry-After"] == "1"
        connection.close()


def test_measurements_that_are_no_numbers():
    """Oracle: by hand; beside the score there may be NaN, in both encodings."""

    def reward(images, prompts):
        return {"some": np.ones(len(images)), "other": np.array([1, np.nan, np.inf])}

    with serving({"some": reward}) as made:
        for encoding in wire.TYPES:
            scores = Remote("some", server=url(made), encoding=encoding)(
                IMAGES[:3], PROMPTS[:3]
            )
            np.testing.assert_array_equal(scores["other"], [1, np.nan, np.nan])


def test_a_request_has_no_more_pixels_than_the_server_takes():
    """Oracle: the reward itself, and the sizes of its calls; an image is 64 pixels."""
    sizes = []

    def counted(images, prompts):
        sizes.append(len(images))
        return bright(images, prompts)

    with serving({"bright": counted}, limits=Limits(pixels=130)) as made:
        scores = Remote("bright", server=url(made))(IMAGES, PROMPTS)
    np.testing.assert_array_equal(scores["bright"], bright(IMAGES, PROMPTS)["bright"])
    assert sorted(sizes) == [1, 2, 2]


def test_pixels_are_taken_in_order():
    """Oracle: a count, and who is first: a large one is not passed by small ones."""

    async def many():
        pixels, inside, order = limits.Pixels(10), [], []

        async def one(name, count):
            async with pixels.taken(count):
                inside.append(count)
                order.append(name)
                assert sum(inside) <= 10
                await asyncio.sleep(0.001)
                inside.remove(count)

        await asyncio.gather(*[one(n, c) for n, c in enumerate([6, 10, 1, 1, 9, 3])])
        return order

    assert asyncio.run(many()) == [0, 1, 2, 3, 4, 5]


LETS_GO = """
import asyncio, gc, weakref
from flowgrpo_jax.rewards.service import routes
gone = []
class Large: pass
def refuse(large):
    gone.append(weakref.ref(large))
    raise routes.Refused(400, "no")
async def call():
    try:
        await routes._in_thread(refuse, Large())
    except routes.Refused:
        return True
gc.disable()
assert asyncio.run(call()) and gone[0]() is None
"""


@pytest.mark.slow
def test_what_was_refused_is_let_go():
    """Oracle: a weak reference; a cycle would keep a body until the collector comes. In
    a process without the tests' type checks, which keep references of their own."""
    subprocess.run([sys.executable, "-c", LETS_GO], check=True, timeout=120)


@pytest.mark.parametrize("module", ["uvicorn", "starlette.applications", "h11"])
def test_without_the_extra_it_says_so(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("routes", "connections"):
        monkeypatch.delitem(
            sys.modules, f"flowgrpo_jax.rewards.service.{name}", raising=False
        )
    with pytest.raises(UserError, match="pip install 'flowgrpo_jax.server.'$"):
        RewardServer(("127.0.0.1", 0))


@pytest.mark.slow
def test_a_reward_that_hangs_keeps_no_process(tmp_path):
    """Oracle: exit codes; the second signal does not wait for the grace."""
    (tmp_path / "hanging.py").write_text(
        "import threading\n\ndef hangs(images, prompts):\n"
        "    threads = [threading.Thread(target=threading.Event().wait)]\n"
        "    threads[0].start()\n    threads[0].join()\n"
    )
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "flowgrpo_jax.rewards.server", "--port=0"),
            "--rewards=hanging.hangs",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}"},
    ) as process:
        try:
            port = int(process.stderr.readline().rpartition(":")[2])
            assert "ready" in process.stderr.readline()
            data = wire.dump(body(rewards=["hanging.hangs"]), "json")
            head = HALF_BODY.partition(b"99999")[0] + b"%d\r\n\r\n" % len(data)
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(head + data)
                time.sleep(1.0)
                process.send_signal(signal.SIGTERM)
                time.sleep(1.0)
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.slow
def test_the_command_serves_and_ends_by_sigterm():
    """Oracle: exit code 0, and a score from another process; a wrong name is one line."""
    command = [sys.executable, "-m", "flowgrpo_jax.rewards.server", "--port=0"]
    name = "jpeg_compressibility"
    with subprocess.Popen(
        [*command, f"--rewards={name}"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            where = process.stderr.readline().split()[-1]
            scores = Remote(name, server=where)(IMAGES, PROMPTS)
            assert scores[name].shape == (5,)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    wrong = subprocess.run(
        [*command, "--rewards=pixscore"], capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: reward: pixscore: must be")
