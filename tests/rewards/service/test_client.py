"""The clients against servers that are down, slow, broken or somebody else's."""

import contextlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks
from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.service import http, wire
from flowgrpo_jax.rewards.service.client import Remote

IMAGES = np.linspace(0, 1, 3 * 8 * 8 * 3, dtype=np.float32).reshape(3, 8, 8, 3)
PROMPTS = [Prompt(f"prompt {n}", {"n": n}, n) for n in range(3)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)


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


def own(scores):
    """An answer of our own server with this text as the scores."""
    return 200, b'{"rewards": {"score": {"score": %s}}}' % scores.encode()


@pytest.mark.parametrize(
    "answer, line",
    [
        (own(f"[1, 2, {'9' * 400}]"), "scores .*: must be finite"),
        (own(f"[1, 2, -{'9' * 400}]"), "scores .*: must be finite"),
        (own(f"[1, 2, {'9' * 5000}]"), "body: not json: "),
        (own("[1, 2, 1e999]"), "scores .*: must be finite"),
        (own("[1, 2, NaN]"), "body: not json: NaN is no number"),
        (own("[1, 2, -Infinity]"), "body: not json: -Infinity"),
        (own("[1, 2, null]"), "scores .*: must be finite"),
        (own('[1, 2, "3"]'), "'3': is no number"),
        (own("[1, 2, [3]]"), r"\[3\]: is no number"),
        (own("[1, 2, " + "[" * 900 + "]" * 900 + "]"), r".*"),
        (own("[" * 100_000), "body: not json: "),
        (own("[1, 2]"), "not one number for each of 3"),
        (own("5"), "an answer without scores"),
        (own("null"), "an answer without scores"),
        (own('[1, 2, 3], "\\u001b[31m": [1, 2, 3]'), "a measurement without a name"),
        (own('[1, 2, 3], "other": [1]'), "not one number for each of 3"),
        (own("[" + "1," * 70_000 + "1]"), "body: not json: more than 65536 values"),
        ((200, b" " * ((1 << 24) + 1)), "an answer of more than 16777216 bytes"),
        ((200, b"[1]"), "an answer without scores"),
        ((200, b"\xff\xfe"), "body: not json"),
        ((400, b"\x1b[31mred\x07\x9b"), r"status 400: \\x1b\[31mred\\x07\ufffd$"),
    ],
)
def test_garbage_is_one_line(answer, line):
    """Oracle: the line; nothing in it that a terminal obeys."""
    with answering(HAS_IT, answer) as (url, _):
        remote = Remote("score", server=url, retries=0)
        with pytest.raises(UserError, match=f"^reward.score: {url}: {line}") as error:
            remote(IMAGES, PROMPTS)
        assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "rewards, line",
    [
        ({"rewards": 5}, "is no reward server"),
        ({"rewards": [5]}, "is no reward server"),
        ({"rewards": ["\x1b[31m"]}, r"has only \\x1b\[31m: start it"),
        ({"rewards": ["score"], "max_pixels": 0}, "max_pixels: 0: is no number"),
        ({"rewards": ["score"], "max_pixels": "9"}, "max_pixels: '9': is no number"),
        (b"[" * 100_000, "body: not json"),
    ],
)
def test_servers_that_are_none(rewards, line):
    with answering((200, rewards)) as (url, _):
        with pytest.raises(UserError, match=f"^reward.score: {url}: {line}"):
            Remote("score", server=url, retries=0)


def test_headers_that_drip_stop_at_the_deadline():
    """Oracle: the clock; a byte comes in time, always."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-A: ")
                while not ended.wait(0.02):
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        url, begin = f"http://127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        with pytest.raises(UserError, match=f"^reward.score: {url}: .*deadline is ov"):
            Remote("score", server=url, deadline=0.5)
        ended.set()
        thread.join()
        assert time.monotonic() - begin < 3.0


NO_URL = "must be http://host:port or https://"
SECRET = "url: use token_env"


@pytest.mark.parametrize(
    "url, line",
    [
        ("http://[::1", NO_URL),
        ("http://[::1]]:80", NO_URL),
        ("http://host:99999", NO_URL),
        ("http://host:-1", NO_URL),
        ("http://host:0", NO_URL),
        ("http://host:port", NO_URL),
        ("http://", NO_URL),
        ("http://:80", NO_URL),
        ("", NO_URL),
        ("host:80", NO_URL),
        ("file:///etc/passwd", NO_URL),
        ("ftp://host", NO_URL),
        ("http://ho st", NO_URL),
        ("http://host/a b", NO_URL),
        ("http://host/\r\nX: y", NO_URL),
        ("http://host\x1b[31m", NO_URL),
        ("http://" + "a" * 70 + ".b", NO_URL),
        ("http://a..b", NO_URL),
        ("http://user:swordfish@host", SECRET),
        ("http://swordfish@host", SECRET),
        ("https://host/v1?key=swordfish", SECRET),
        ("https://host/v1#swordfish", SECRET),
        ("ftp://user:swordfish@host", SECRET),
        ("http://user:swordfish@[::1", SECRET),
        ("http:/user:swordfish@host", SECRET),
        ("user:swordfish@host", SECRET),
    ],
)
def test_urls_that_are_none(url, line):
    """Oracle: the lines, by hand; a secret is never in them."""
    with pytest.raises(UserError) as error:
        Remote("score", server=url)
    told = str(error.value)
    assert told.startswith("reward.score: ") and line in told and told.isprintable()
    assert "swordfish" not in told


@pytest.mark.parametrize("name, key", [("score", "server"), ("qwenvl", "url")])
def test_a_secret_is_not_told_by_a_line_of_another_option(name, key):
    for extra in ({}, {"colour": 1}):
        options = {name: {key: "http://me:swordfish@host"} | extra}
        with pytest.raises(UserError, match="^reward.*token_env") as error:
            registry.make(name, Context(options=options))
        assert "swordfish" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://h", "https://h:1/v1/", "http://[::1]:80", "http://müller.de"]
)
def test_urls_that_are_good(url):
    assert http.Endpoint("score", url).url == url


@pytest.mark.parametrize(
    "options",
    [
        *({key: 0} for key in ("batch", "concurrency")),
        *({key: -1} for key in ("batch", "retries")),
        *({key: 0.0} for key in ("timeout", "deadline")),
        *({key: -1.0} for key in ("timeout", "deadline")),
        *({key: float("nan")} for key in ("timeout", "deadline")),
        {"deadline": float("inf")},
        {"timeout": 1e12},
    ],
)
def test_options_that_are_none(options):
    [key] = options
    with pytest.raises(UserError, match=f"^reward_options.score.{key}: "):
        Remote("score", server="http://127.0.0.1:9", **options)


@pytest.mark.parametrize("token", ["a\nb", "ä", "a\x1b"])
def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch, token):
    monkeypatch.setenv("A_TOKEN", token)
    with pytest.raises(UserError, match="token_env: A_TOKEN: must hold print") as error:
        http.token_of("score", "A_TOKEN")
    assert token not in str(error.value)


HALF = "a cyan \ud83d circle"


@pytest.mark.parametrize("encoding", wire.TYPES)
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(HALF, {}, 7),
        Prompt("a", {"note": HALF}, 7),
        Prompt("a", {HALF: 1}, 7),
        Prompt("a", {"list": [{"deep": [HALF]}]}, 7),
        Prompt("a", {"set": {1}}, 7),
        Prompt("a", {"number": np.float32(1)}, 7),
    ],
)
def test_prompts_that_cannot_be_sent_are_named(encoding, prompt):
    """Oracle: the line, with index and text, before anything is sent."""
    with answering(HAS_IT, SCORES) as (url, asked):
        remote = Remote("score", server=url, encoding=encoding)
        with pytest.raises(ValueError, match="^(holds half of|cannot be sent as)"):
            remote.check_prompt(prompt)
        with pytest.raises(UserError, match=r"^reward.score: prompt 7 \('a.*'\) "):
            remote(IMAGES, [*PROMPTS[:2], prompt])
        assert len(asked) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"a": float("nan")}]])
def test_records_with_numbers_that_json_has_not(value):
    """Oracle: the line in JSON; msgpack has such numbers."""
    prompt = Prompt("a circle", {"prompt": "a circle", "weight": value}, 7)
    with answering(HAS_IT) as (url, _):
        with pytest.raises(ValueError, match="^cannot be sent as json: Out of range"):
            Remote("score", server=url).check_prompt(prompt)
        Remote("score", server=url, encoding="msgpack").check_prompt(prompt)


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
