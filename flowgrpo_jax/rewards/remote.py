"""A reward that a server computes: `reward_options.NAME.server` says where.

Names in configs and metrics are those of the reward itself, wherever it runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import geneval_records, ocr, wire
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.endpoint import Endpoint, token_of

Answer = dict[str, list[float | int]]


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
    """Scores from a server, which is asked once, before training, whether it is there.

    Args:
      server: its url. `protocol` is the kind of server: this package's, or one that
        takes the field names of flow_grpo or verl in JSON.
      token_env: name of the environment variable that holds the bearer token.
      timeout, retries: of one request, see `Endpoint`.
      deadline: seconds for all requests of one call together.
      batch: images per request; `concurrency`: requests at once.
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
                raise UserError(
                    f"reward_options.{name}.{key}: {value}: must be one of "
                    f"{', '.join(allowed)}"
                )
        self._name, self._protocol = name, PROTOCOLS[protocol]
        self.check_prompt = _CHECKS.get(name)
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
        starts = range(0, len(host), self._batch)

        def ask(start):
            part = slice(start, start + self._batch)
            return self._ask(host[part], prompts[part], until)

        with ThreadPoolExecutor(self._threads) as threads:
            answers = list(threads.map(ask, starts))
        return {
            key: np.concatenate([np.asarray(one[key], np.float64) for one in answers])
            for key in answers[0]
        }

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
        try:
            answer = self._protocol.answer(self._name, wire.load(data, self._encoding))
            fits = all(len(values) == count for values in answer.values())
            numbers = all(
                isinstance(value, int | float)
                for values in answer.values()
                for value in values
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an answer without scores: {data[:80]!r}") from error
        if not fits or not numbers:
            raise ValueError(f"not one number for each of {count} images")
        return answer

    def _check(self) -> None:
        """UserError unless the server is ready and has this reward."""

        def read(data: bytes) -> list[str]:
            body = wire.load(data, "json")
            if not isinstance(body, Mapping) or "rewards" not in body:
                raise ValueError(f"is no reward server: {data[:80]!r}")
            return body["rewards"]

        until = time.monotonic() + self._deadline
        names = self._endpoint.ask("GET", "/rewards", None, "", read, until)
        if self._name not in names:
            raise UserError(
                f"reward.{self._name}: {self._endpoint.url}: has only "
                f"{', '.join(names)}: start it with --rewards={self._name}"
            )
