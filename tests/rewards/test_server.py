"""The reward server: many clients, wrong requests, and nothing of theirs executed."""

import contextlib
import http.client
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import server as servers
from flowgrpo_jax.rewards import wire
from flowgrpo_jax.rewards.remote import Remote
from flowgrpo_jax.rewards.server import Limits, RewardServer

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
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


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
    head = b"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\n"
    kind = b"Content-Type: application/json\r\n"
    sized = head + kind + b"Content-Length: %d\r\n\r\n"
    assert " 413 " in raw(server, sized % (1 << 40))
    assert " 411 " in raw(server, head + kind + b"Transfer-Encoding: chunked\r\n\r\n")
    assert " 411 " in raw(server, head + kind + b"Content-Length: -5\r\n\r\n")
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
            while made.slots._value:
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
