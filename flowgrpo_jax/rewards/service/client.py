"""A reward that a server computes; `reward_options.NAME.server` is its url.

A reward has the same name in configs and metrics wherever it runs.
"""

import math
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards import geneval_records, ocr
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.service import wire
from flowgrpo_jax.rewards.service.http import (
    Endpoint,
    check_positive,
    check_whole,
    printable,
    token_of,
)

Answer = dict[str, list[float]]
_NO_LIMIT = 1 << 62


class _Protocol(NamedTuple):
    """How a kind of server names things."""

    path: str
    request: Callable[[str, list[bytes], Sequence[Prompt]], dict[str, Any]]
    answer: Callable[[str, Any], Answer]


def _own_request(name, files, prompts):
    return {"rewards": [name], "images": files, "prompts": wire.prompt_values(prompts)}


def _flow_grpo_request(name, files, prompts):
    metadata = [dict(prompt.metadata) for prompt in prompts]
    return {"images": files, "meta_datas": metadata, "only_strict": True}


def _verl_request(name, files, prompts):
    metadata = [dict(prompt.metadata) for prompt in prompts]
    texts = [prompt.text for prompt in prompts]
    return {"images": files, "prompts": texts, "metadata": metadata}


PROTOCOLS = {
    "flowgrpo_jax": _Protocol(
        "/score", _own_request, lambda name, body: dict(body["rewards"][name])
    ),
    # The field names of flow_grpo's GenEval server and of verl-omni's, in JSON.
    "flow_grpo": _Protocol(
        "/", _flow_grpo_request, lambda name, body: {name: body["scores"]}
    ),
    "verl": _Protocol("/", _verl_request, lambda name, body: {name: body["scores"]}),
}


# What the rewards of these names need of a prompt, whoever computes them.
_CHECKS: dict[str, Callable[[Prompt], None]] = {
    "geneval": lambda prompt: geneval_records.check(prompt.metadata),
    "ocr": ocr.check_prompt,
}


class Remote:
    """Scores from a server. It is asked once, before training, whether it is ready.

    Args:
      server: its url. `protocol` is the kind of server: this package's, or one that
        takes the field names of flow_grpo or verl in JSON.
      token_env: name of the environment variable that holds the bearer token.
      timeout, retries: of one request, see `Endpoint`.
      deadline: seconds for all requests of one call together.
      batch: images per request, fewer where the server takes fewer pixels at once;
        `concurrency`: requests at once.
      format: png (exact to 8 bits) or jpeg; encoding: json or msgpack.
    """

    def __init__(
        self,
        name: str,
        *,
        server: str,
        protocol: str = "flowgrpo_jax",
        token_env: str = "",
        timeout: float = 120.0,
        deadline: float = 300.0,
        retries: int = 5,
        batch: int = 64,
        concurrency: int = 1,
        format: str = "png",
        encoding: str = "json",
    ):
        for key, value, allowed in (
            ("protocol", protocol, PROTOCOLS),
            ("format", format, wire.FORMATS),
            ("encoding", encoding, wire.TYPES),
        ):
            if value not in allowed:
                raise not_one_of(f"reward_options.{name}.{key}", value, allowed)
        check_positive(name, deadline=deadline)
        check_whole(name, 1, batch=batch, concurrency=concurrency)
        self._name, self._protocol = name, PROTOCOLS[protocol]
        self._max_pixels = _NO_LIMIT
        self._deadline, self._batch, self._threads = deadline, batch, concurrency
        self._format, self._encoding = format, encoding
        token = token_of(name, token_env)
        self._endpoint = Endpoint(name, server, token, timeout, retries)
        if protocol == "flowgrpo_jax":
            self._check()

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        until = time.monotonic() + self._deadline
        host = np.asarray(images)
        for prompt in prompts:
            wire.check_named(self._name, prompt, self._encoding)
        pixels = host.shape[1] * host.shape[2]
        batch = max(1, min(self._batch, self._max_pixels // pixels))
        starts = range(0, len(host), batch)

        def ask(start):
            part = slice(start, start + batch)
            return self._ask(host[part], prompts[part], until)

        with ThreadPoolExecutor(self._threads) as threads:
            answers = list(threads.map(ask, starts))
        if any(set(answer) != set(answers[0]) for answer in answers):
            raise UserError(
                f"reward.{self._name}: {self._endpoint.url}: measures other things in "
                "every request"
            )
        return {
            key: np.concatenate([np.asarray(one[key], np.float64) for one in answers])
            for key in answers[0]
        }

    def check_prompt(self, prompt: Prompt) -> None:
        """ValueError, which goes on from "the prompt", for one that cannot be scored."""
        wire.check_prompt(prompt, self._encoding)
        _CHECKS.get(self._name, lambda prompt: None)(prompt)

    def _ask(self, images, prompts, until: float) -> Answer:
        files = [wire.image_file(image, self._format) for image in images]
        body = self._protocol.request(self._name, files, prompts)
        return self._endpoint.ask(
            "POST",
            self._protocol.path,
            wire.dump(body, self._encoding),
            wire.TYPES[self._encoding],
            lambda data: self._read(data, len(files)),
            until,
        )

    def _read(self, data: bytes, count: int) -> Answer:
        """The measurements; ValueError for garbage, which is worth another attempt."""
        body = wire.load(data, self._encoding)
        try:
            answer = self._protocol.answer(self._name, body)
            columns = {key: list(values) for key, values in answer.items()}
            scores = columns[self._name]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"an answer without scores: {data[:80]!r}") from error
        if not all(isinstance(key, str) and key.isprintable() for key in columns):
            raise ValueError("a measurement without a name that can be printed")
        if not all(len(values) == count for values in columns.values()):
            raise ValueError(f"not one number for each of {count} images")
        table = {key: [_number(v) for v in vs] for key, vs in columns.items()}
        if not np.isfinite(table[self._name]).all():
            raise ValueError(f"scores {reprlib.repr(scores)}: must be finite")
        return table

    def _check(self) -> None:
        """UserError unless the server is ready and has this reward."""

        def read(data: bytes) -> tuple[list[str], int]:
            body = wire.load(data, "json")
            names = body.get("rewards") if isinstance(body, Mapping) else None
            if not isinstance(names, list) or not all(
                isinstance(name, str) for name in names
            ):
                raise ValueError(f"is no reward server: {data[:80]!r}")
            most = body.get("max_pixels", _NO_LIMIT)  # older servers do not tell
            if not isinstance(most, int) or most < 1:
                raise ValueError(f"max_pixels: {reprlib.repr(most)}: is no number")
            return names, most

        until = time.monotonic() + self._deadline
        names, self._max_pixels = self._endpoint.ask(
            "GET", "/rewards", None, "", read, until
        )
        if self._name not in names:
            raise UserError(
                f"reward.{self._name}: {self._endpoint.url}: has only "
                f"{printable(', '.join(names))[:200]}: start it with "
                f"--rewards={self._name}"
            )


def _number(value: Any) -> float:
    """A measurement; null is one that the server has not. ValueError for no number."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ValueError(f"{reprlib.repr(value)}: is no number")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
