"""Scores that were paid for are kept: the same image and prompt are not asked twice.

A resumed run makes the images of its last iterations again, bit for bit, and finds
their scores in a file: `reward_options.NAME.replay` names it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import paths
from flowgrpo_jax.runtime.workdir import close_in_children

# Options that say where and how patiently, not what is asked.
_NO_MATTER = frozenset(
    {
        *("server", "url", "token_env", "timeout", "deadline", "retries"),
        *("concurrency", "batch", "encoding"),
    }
)


class Replay:
    """A pointwise reward whose scores are kept in a file, one line per image.

    A line holds the SHA-256 of the reward's name and options, the prompt and the pixels,
    and what was measured. Lines are only ever added, and are on disk before they are
    used; a last one that a crash has cut is dropped. UserError for a file that cannot
    be used, or that another process is using.
    """

    def __init__(
        self, name: str, reward: Reward, path: Any, options: Mapping[str, Any]
    ):
        self._reward, self._lock = reward, threading.Lock()
        self.on_device = getattr(reward, "on_device", False)
        self.check_prompt = getattr(reward, "check_prompt", None)
        kept = {k: v for k, v in options.items() if k not in _NO_MATTER}
        self._config = json.dumps([name, kept], sort_keys=True, default=repr)
        where = self._where = f"reward_options.{name}.replay: {path}"
        try:
            local = paths.local(path)
            local.parent.mkdir(parents=True, exist_ok=True)
            self._file = local.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            close_in_children(self._file)
        except BlockingIOError as error:
            raise UserError(f"{where}: in use by another run: take another") from error
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:  # a NUL in it, a list
            raise UserError(f"{where}: must be the path of a file: {error}") from error
        try:
            self._known = _read(self._file)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{where}: holds no scores: take another file") from error

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        pixels = np.asarray(images)
        keys = [
            self._key(image, prompt)
            for image, prompt in zip(pixels, prompts, strict=True)
        ]
        with self._lock:
            first = {key: n for n, key in enumerate(keys) if key not in self._known}
            new = sorted(first.values())
            if new:
                measured = self._reward(pixels[new], [prompts[n] for n in new])
                self._add([keys[n] for n in new], measured)
            rows = [self._known.get(key) or {} for key in keys]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {
            name: np.array([row.get(name, np.nan) for row in rows], np.float64)
            for name in names
        }

    def _key(self, image: np.ndarray, prompt: Prompt) -> str:
        digest = hashlib.sha256(self._config.encode())
        asked = [prompt.text, dict(prompt.metadata)]
        digest.update(json.dumps(asked, sort_keys=True, default=repr).encode())
        digest.update(f"{image.dtype} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()

    def _add(self, keys: list[str], measured: Mapping[str, Any]) -> None:
        """Write what was measured, then know it; what is no number is not kept.

        All lines or none: a torn one in the middle would spoil the file.
        """
        columns = {name: np.asarray(v, np.float64) for name, v in measured.items()}
        if any(values.shape != (len(keys),) for values in columns.values()):
            raise ValueError(f"not one number for each of {len(keys)} images")
        rows = [
            {name: float(v[n]) for name, v in columns.items()} for n in range(len(keys))
        ]
        lines = [
            json.dumps({"key": key, "scores": row})
            for key, row in zip(keys, rows, strict=True)
            if np.isfinite(list(row.values())).all()
        ]
        whole = os.fstat(self._file.fileno()).st_size
        try:
            data = "".join(f"{line}\n" for line in lines).encode()
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._file.fileno(), whole)
            raise UserError(
                f"{self._where}: {(error.strerror or str(error)).lower()}: free some "
                "space or name another file; what it holds is intact"
            ) from error
        self._known |= dict(zip(keys, rows, strict=True))


def _read(file: Any) -> dict[str, dict[str, float]]:
    """Key -> scores of all whole lines; a cut one at the end is taken off the file."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        if whole == 0 and not data.startswith(b'{"key"'[: len(data)]):
            raise ValueError("another kind of file")
        file.truncate(whole)
    lines = [json.loads(line) for line in data[:whole].splitlines()]
    known = {}
    for line in lines:
        if not isinstance(line["key"], str) or not isinstance(line["scores"], dict):
            raise ValueError("another kind of line")
        known[line["key"]] = {
            str(name): _number(value) for name, value in line["scores"].items()
        }
    return known


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{type(value).__name__} is no score")
    if not abs(value) <= sys.float_info.max:  # NaN, or more than 308 digits
        raise ValueError("a score must be finite")
    return float(value)
