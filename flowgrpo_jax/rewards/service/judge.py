"""A vision-language model as a judge, behind an OpenAI-compatible server.

One request per image: a text from a template, the image as a PNG data URL, temperature
0. A score is what a regular expression finds in the answer. vLLM and sglang serve such
models; `unifiedreward` and `qwenvl` are judges with the templates below.
"""

import base64
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.registry import Context
from flowgrpo_jax.rewards.service import wire
from flowgrpo_jax.rewards.service.http import (
    Endpoint,
    check_positive,
    check_url,
    check_whole,
    token_of,
)

_JSON = "application/json"
UNIFIED_REWARD = """\
Here are a caption and an image that was generated from it. Rate the image by two
criteria: how well it shows what the caption says (objects, attributes, relations), and
how good it is as a picture (sharpness, plausibility, appeal). Give one score from 1
(worst) to 5 (best) after 'Final Score:'.
Caption: {prompt}"""
QWEN_VL = """\
Rate how pleasing this image is to look at, from 1 (poor) to 5 (excellent): composition,
light, colour, and freedom from artefacts. Give your reasons briefly, then the number as
<Score>number</Score>."""
_NUMBER = r"(-?\d+(?:\.\d+)?)"


class Judge:
    """Scores in [0, 1] by a vision-language model: the number it names, over `scale`.

    Args:
      url: of the server, with the /v1 that its API has; `model`: its name there.
      template: the question; {prompt} stands for the prompt of the image.
      pattern: regular expression; its first group is the number, its last match counts.
      lowest, scale: numbers outside of [lowest, scale] are not taken.
      unparsed: the score of an answer without a number; None: no score, and the
        config's `reward_failure` says what then happens. Their share is measured.
      size: images are resized to size x size pixels; 0 keeps them.
      token_env, timeout, retries, deadline: as those of `Remote`.
      concurrency: requests at once.
    """

    def __init__(
        self,
        name: str,
        *,
        url: str,
        model: str,
        template: str,
        pattern: str,
        lowest: float = 1.0,
        scale: float = 5.0,
        unparsed: float | None = None,
        size: int = 512,
        max_tokens: int = 2048,
        token_env: str = "",
        timeout: float = 120.0,
        deadline: float = 300.0,
        retries: int = 5,
        concurrency: int = 8,
    ):
        check_positive(name, deadline=deadline, scale=scale)
        check_whole(name, 1, max_tokens=max_tokens, concurrency=concurrency)
        check_whole(name, 0, size=size)
        for key, text in (("model", model), ("template", template)):
            if not isinstance(text, str):
                raise UserError(f"reward_options.{name}.{key}: {text}: must be a text")
        for key, number in (("lowest", lowest), ("unparsed", unparsed)):
            if not (number is None or _is_finite(number)) or lowest is None:
                raise UserError(
                    f"reward_options.{name}.{key}: {number!r}: must be a finite number"
                )
        if lowest >= scale:
            raise UserError(
                f"reward_options.{name}.lowest: {lowest}: must be below scale ({scale})"
            )
        self._name, self._model, self._template = name, model, template
        self._lowest, self._scale, self._unparsed = lowest, scale, unparsed
        self._size, self._max_tokens = size, max_tokens
        self._deadline, self._threads = deadline, concurrency
        try:
            self._pattern = re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise UserError(
                f"reward_options.{name}.pattern: {pattern}: {error}"
            ) from error
        if self._pattern.groups < 1:
            raise UserError(
                f"reward_options.{name}.pattern: {pattern}: needs a group, as in "
                "Score: ([0-9.]+)"
            )
        token = token_of(name, token_env)
        self._endpoint = Endpoint(name, url, token, timeout, retries)
        until = time.monotonic() + deadline
        self._endpoint.ask("GET", "/models", None, "", _models, until)

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        until = time.monotonic() + self._deadline
        for prompt in prompts:
            wire.check_named(self._name, _asked(prompt), "json")
        with ThreadPoolExecutor(self._threads) as threads:
            answers = list(
                threads.map(
                    lambda image, prompt: self._ask(image, prompt, until),
                    np.asarray(images),
                    prompts,
                )
            )
        numbers = [self._number(answer) for answer in answers]
        unparsed = np.nan if self._unparsed is None else self._unparsed
        return {
            self._name: np.array([unparsed if n is None else n for n in numbers]),
            f"{self._name}_unparsed": np.array([float(n is None) for n in numbers]),
        }

    def check_prompt(self, prompt: Prompt) -> None:
        """ValueError, which goes on from "the prompt", for one that cannot be asked."""
        wire.check_prompt(_asked(prompt), "json")

    def _ask(self, image: np.ndarray, prompt: Prompt, until: float) -> str:
        picture = base64.b64encode(wire.image_file(self._resized(image))).decode()
        text = self._template.replace("{prompt}", prompt.text)
        content = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{picture}"},
            },
            {"type": "text", "text": text},
        ]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        return self._endpoint.ask(
            "POST",
            "/chat/completions",
            json.dumps(body).encode(),
            _JSON,
            _text_of,
            until,
        )

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if not self._size or image.shape[:2] == (self._size, self._size):
            return image
        pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
        resized = Image.fromarray(pixels).resize((self._size, self._size))
        return np.asarray(resized, np.float32) / 255

    def _number(self, answer: str) -> float | None:
        """The score that the answer names, None if it names none."""
        found = list(self._pattern.finditer(answer))
        try:
            number = float(found[-1][1]) if found else None
        except (TypeError, ValueError):
            return None
        if number is None or not self._lowest <= number <= self._scale:
            return None
        return number / self._scale


def _asked(prompt: Prompt) -> Prompt:
    """The part of a prompt that is sent: its text, without the record."""
    return Prompt(prompt.text, {}, prompt.index)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _models(data: bytes) -> None:
    """ValueError for an answer that no OpenAI-compatible server gives."""
    if not isinstance(wire.load(data, "json"), dict):
        raise ValueError(f"is no server of models: {data[:80]!r}")


def _text_of(data: bytes) -> str:
    """The model's words; ValueError for an answer that has none."""
    try:
        text = wire.load(data, "json")["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer without a message: {data[:80]!r}") from error
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    return text


def _made(name: str, options: dict[str, Any]) -> Judge:
    if "url" in options:  # before a line of another option can tell all of them
        check_url(name, options["url"])
    return Judge(name, **options)


def judge(context: Context, **options) -> Judge:
    """Any model: `model`, `template` and `pattern` are the user's."""
    return _made("judge", options)


def unified_reward(context: Context, **options) -> Judge:
    """UnifiedReward (arXiv 2503.05236) as Flow-GRPO asks it: "Final Score:", over 5."""
    defaults = {
        "url": "http://127.0.0.1:17140/v1",
        "model": "UnifiedReward-7b-v1.5",
        "template": UNIFIED_REWARD,
        "pattern": rf"Final Score:\s*\**\s*{_NUMBER}",
    }
    return _made("unifiedreward", defaults | options)


def qwen_vl(context: Context, **options) -> Judge:
    """Qwen2.5-VL rates how pleasing an image is, whatever its prompt; over 5."""
    defaults = {
        "url": "http://127.0.0.1:8000/v1",
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "template": QWEN_VL,
        "pattern": rf"<Score>\s*{_NUMBER}\s*</Score>",
    }
    return _made("qwenvl", defaults | options)
