"""Judges against a server that answers as vLLM and sglang do."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rewards.registry import Context
from tests.rewards.service.test_client import IMAGES, PROMPTS, answering


def says(*words):
    """Chat completions with these words, by the number in the prompt."""

    def complete(path, request):
        if path == "/v1/models":
            return {"data": []}
        text = request["messages"][0]["content"][1]["text"]
        return {"choices": [{"message": {"content": words[int(text[-1])]}}]}

    return 200, complete


def judge(url, name="unifiedreward", **options):
    return registry.make(
        name, Context(options={name: {"url": f"{url}/v1", "retries": 0} | options})
    )


def test_unified_reward_is_asked_and_understood():
    """Oracle: the scale of the reference, number / 5; the picture that was sent."""
    answers = [
        "Final Score: 4",
        "Good. final: 1\nFinal Score: **2.5**",
        "Final Score: 5.",
    ]
    with answering(says(*answers)) as (url, asked):
        scores = judge(url)(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores["unifiedreward"], [0.8, 0.5, 1.0])
    np.testing.assert_array_equal(scores["unifiedreward_unparsed"], [0, 0, 0])
    path, request = sorted(asked[1:], key=lambda one: str(one[1]["messages"])[-9:])[0]
    assert path == "/v1/chat/completions" and request["temperature"] == 0
    picture, text = request["messages"][0]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 512)
    assert text["text"].endswith("Caption: prompt 0")


def test_answers_without_a_number():
    """Oracle: by hand; NaN or the stated default, and their share is measured."""
    words = ("<Score>3</Score>", "<Score>9</Score>", "I cannot")
    options = {"template": "{prompt}", "pattern": "<Score>([0-9.]+)</Score>"}
    with answering(says(*words)) as (url, _):
        scores = judge(url, "qwenvl", **options)(IMAGES, PROMPTS)
        np.testing.assert_array_equal(scores["qwenvl"], [0.6, np.nan, np.nan])
        np.testing.assert_array_equal(scores["qwenvl_unparsed"], [0, 1, 1])
        scores = judge(url, "qwenvl", unparsed=0.0, **options)(IMAGES, PROMPTS)
        np.testing.assert_array_equal(scores["qwenvl"], [0.6, 0, 0])


def test_wrong_judges_are_named():
    """Oracle: the lines, by hand."""
    options = {"model": "m", "template": "{prompt}"}
    with answering(says("1")) as (url, _):
        with pytest.raises(UserError, match=r"^reward_options.judge.pattern: \(: "):
            judge(url, "judge", pattern="(", **options)
        with pytest.raises(
            UserError, match="^reward_options.judge.pattern: 5: needs a g"
        ):
            judge(url, "judge", pattern="5", **options)
        with pytest.raises(UserError, match="^reward: judge: options .*'model'"):
            judge(url, "judge")
    with pytest.raises(UserError, match=f"^reward.unifiedreward: {url}/v1: .*refused"):
        judge(url)


@pytest.mark.parametrize(
    "answer, line",
    [
        ({"choices": []}, "an answer without a message"),
        ({"choices": [{"message": {"content": None}}]}, "an answer without text"),
        ({"choices": [{"message": "?"}]}, "an answer without a message"),
        (b"[" * 100_000, "body: not json"),
        (b'{"choices": %s}' % (b"9" * 5000), "body: not json"),
        (b"5", "an answer without a message"),
        (b"", "body: not json"),
        (b"\x1b[31m", "body: not json"),
        (b" " * ((1 << 24) + 1), "an answer of more than 16777216 bytes"),
    ],
)
def test_garbage_is_one_line(answer, line):
    """Oracle: the line, by hand."""
    models = (200, {"data": []})
    with answering(models, (200, answer)) as (url, _):
        with pytest.raises(UserError, match=line) as error:
            judge(url)(IMAGES, PROMPTS)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("answer", [b"[" * 100_000, b"9" * 5000, b"[]", b"null"])
def test_servers_without_models(answer):
    with answering((200, answer)) as (url, _):
        with pytest.raises(UserError, match=f"^reward.unifiedreward: {url}/v1: "):
            judge(url)


@pytest.mark.parametrize(
    "options",
    [
        *({"lowest": v} for v in (float("nan"), float("inf"), 5.0)),
        *({"scale": v} for v in (0.0, float("nan"), -1.0)),
        *({"unparsed": v} for v in (float("nan"), float("inf"))),
        *({key: 0} for key in ("max_tokens", "concurrency")),
        *({key: 0.0} for key in ("deadline", "timeout")),
        *({key: -1} for key in ("size", "retries")),
    ],
)
def test_options_that_are_none(options):
    [key] = options
    with pytest.raises(UserError, match=f"^reward_options.qwenvl.{key}: "):
        judge("http://127.0.0.1:9", "qwenvl", **options)


def test_a_prompt_that_cannot_be_asked_is_named():
    """Oracle: the line; what only the record holds is not sent and does not matter."""
    prompts = [Prompt("a", {"half": "\ud83d", "nan": float("nan")}, 3)] * 2
    with answering(says("Final Score: 4", "Final Score: 4")) as (url, asked):
        one = judge(url, template="{prompt} 0")
        one.check_prompt(prompts[0])
        one(IMAGES[:2], prompts)
        with pytest.raises(UserError, match=r"prompt 9 \('\\ud83d'\) holds half"):
            one(IMAGES[:1], [Prompt("\ud83d", {}, 9)])
