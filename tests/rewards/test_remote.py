"""The clients against servers that are down, slow, broken or somebody else's."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from flowgrpo_jax import checks
from flowgrpo_jax import config as configs
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import endpoint, registry
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.remote import Remote

IMAGES = np.linspace(0, 1, 3 * 8 * 8 * 3, dtype=np.float32).reshape(3, 8, 8, 3)
PROMPTS = [Prompt(f"prompt {n}", {"n": n}, n) for n in range(3)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def answering(*answers):
    """A server that gives these (status, body) in turn, the last one for ever.

    A body that is a function gets (path, request); one that is None never comes.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            request = json.loads(self.rfile.read(length) or "null")
            status, made = answers[min(len(asked), len(answers) - 1)]
            asked.append((self.path, request))
            if made is None:
                ended.wait(10)
                return
            made = made(self.path, request) if callable(made) else made
            self.send_response(status)
            self.end_headers()
            if made == "drip":
                with contextlib.suppress(OSError):
                    while not ended.wait(0.05):
                        self.wfile.write(b" ")
                return
            self.wfile.write(
                made if isinstance(made, bytes) else json.dumps(made).encode()
            )

        do_GET = do_POST = _answer

        def log_message(self, *_):
            pass

    ended = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            ended.set()
            server.shutdown()
            thread.join()


HAS_IT = (200, {"rewards": ["score"]})
SCORES = (200, {"rewards": {"score": {"score": [1, 2.5, 3]}}})


def test_trouble_that_passes_is_tried_again():
    """Oracle: the scores after a status 500, garbage and wrong counts in between."""
    short = (200, {"rewards": {"score": {"score": [1]}}})
    null = (200, {"rewards": {"score": {"score": [1, None, 2]}}})
    with answering(HAS_IT, (500, "no"), (200, b"\x80rubbish"), short, null, SCORES) as (
        url,
        asked,
    ):
        remote = Remote("score", server=url, retries=4)
        np.testing.assert_array_equal(remote(IMAGES, PROMPTS)["score"], [1, 2.5, 3])
    assert [path for path, _ in asked] == ["/rewards"] + ["/score"] * 5


@pytest.mark.parametrize(
    "answer, line",
    [
        (
            (500, {"error": "out of memory"}),
            "status 500: .*out of memory.*; tried 3 ti",
        ),
        ((200, b"<html>"), "body: not json: .*; tried 3 times"),
        ((200, {"rewards": {}}), "an answer without scores: .*; tried 3 times"),
        ((401, {"error": "token"}), "status 401: "),
        ((413, {"error": "too large"}), "status 413: "),
    ],
)
def test_trouble_that_stays_stops_with_one_line(answer, line):
    """Oracle: the line names the reward and the url; refusals are not tried again."""
    with answering(HAS_IT, answer) as (url, asked):
        remote = Remote("score", server=url, retries=2)
        with pytest.raises(UserError, match=f"^reward.score: {url}: {line}"):
            remote(IMAGES, PROMPTS)
        assert len(asked) == (4 if "tried" in line else 2)


@pytest.mark.parametrize("hangs", [(200, None), (200, "drip")])
def test_a_server_that_hangs_or_drips_stops_at_the_deadline(hangs):
    """Oracle: the clock, for several requests together."""
    with answering(HAS_IT, hangs) as (url, _):
        remote = Remote("score", server=url, deadline=0.4, batch=1)
        begin = time.monotonic()
        with pytest.raises(
            UserError, match=f"^reward.score: {url}: .*deadline is over"
        ):
            remote(IMAGES, PROMPTS)
        assert time.monotonic() - begin < 3.0


def test_a_server_that_is_down_is_found_before_training():
    """Oracle: the line; nothing listens on the port of a server that has ended."""
    with answering(HAS_IT) as (url, _):
        with pytest.raises(
            UserError, match="^reward.other: .*has only score: start it"
        ):
            Remote("other", server=url)
    with pytest.raises(
        UserError, match=f"^reward.score: {url}: .*refused; tried 2 tim"
    ):
        Remote("score", server=url, retries=1)


def test_a_server_that_loads_is_waited_for():
    """Oracle: a count; 503 is not an attempt."""
    with answering(*[(503, "loading")] * 4, HAS_IT) as (url, asked):
        Remote("score", server=url, retries=0)
        assert len(asked) == 5


@pytest.mark.parametrize(
    "protocol, fields",
    [
        ("flow_grpo", {"images", "meta_datas", "only_strict"}),
        ("verl", {"images", "prompts", "metadata"}),
    ],
)
def test_field_names_of_other_servers(protocol, fields):
    """Oracle: reference fields of those servers, by hand."""
    with answering((200, {"scores": [0.5, 0, 1]})) as (url, asked):
        remote = Remote("geneval", server=url, protocol=protocol)
        scores = remote(IMAGES, PROMPTS)
    np.testing.assert_array_equal(scores["geneval"], [0.5, 0, 1])
    ((path, request),) = asked
    assert path == "/" and set(request) == fields and len(request["images"]) == 3


def test_in_a_config(monkeypatch):
    """Oracle: by hand; any name will do where a server has it, and options are named."""
    with answering(HAS_IT, SCORES) as (url, _):
        options = {"score": {"server": url, "retries": 0}}
        checks.check(configs.make(reward={"score": 1.0}, reward_options=options))
        reward = registry.combine({"score": 2.0}, Context(options=options))
        np.testing.assert_array_equal(reward(IMAGES, PROMPTS)["avg"], [2, 5, 6])
    for wrong, line in {
        "server": "reward.score: ftp://x: must be http",
        "protocol": "reward_options.score.protocol: ftp://x: must be one of flow",
        "colour": "reward: score: options .*unexpected keyword argument 'colour'",
        "token_env": "reward.score: token_env: ftp://x: this environment",
    }.items():
        options = {"score": {"server": "http://127.0.0.1:9"} | {wrong: "ftp://x"}}
        with pytest.raises(UserError, match=f"^{re.sub('[/]', '.', line)}"):
            registry.make("score", Context(options=options))
