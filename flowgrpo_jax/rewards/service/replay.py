"""Scores that were paid for are kept: the same image and prompt are not asked twice.

A resumed run makes the images of its last iterations again, bit for bit, and finds
their scores in a file: `reward_options.NAME.replay` names it.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.registry import Reward
from flowgrpo_jax.runtime import database, paths

# Options that say where and how patiently, not what is asked.
_NO_MATTER = frozenset(
    {
        *("server", "url", "token_env", "timeout", "deadline", "retries"),
        *("concurrency", "batch", "encoding"),
    }
)
_TABLES = (
    "CREATE TABLE IF NOT EXISTS scores (image BLOB NOT NULL, name TEXT NOT NULL, "
    "value REAL NOT NULL, PRIMARY KEY (image, name)) STRICT, WITHOUT ROWID",
)


class Replay:
    """A pointwise reward whose scores are kept in an SQLite file.

    An image has a row for each of its measurements, under the SHA-256 of the reward's
    name and options, the prompt and the pixels. They are on disk before they are used;
    runs that share the file find one another's. UserError for a file that cannot be
    used.
    """

    def __init__(
        self, name: str, reward: Reward, path: Any, options: Mapping[str, Any]
    ):
        self._reward, self._lock = reward, threading.Lock()
        self.on_device = getattr(reward, "on_device", False)
        self.check_prompt = getattr(reward, "check_prompt", None)
        self.reader = getattr(reward, "reader", None)
        kept = {k: v for k, v in options.items() if k not in _NO_MATTER}
        self._config = json.dumps([name, kept], sort_keys=True, default=repr)
        self._where = f"reward_options.{name}.replay: {path}"
        try:
            self._path = Path(paths.local(path))
            database.create(self._path, _TABLES)
        except database.ERRORS as error:
            raise self._failure(error, "take another file") from error
        except (ValueError, TypeError) as error:  # a NUL in it, a list
            raise UserError(
                f"{self._where}: must be the path of a file: {error}"
            ) from error

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, np.ndarray]:
        pixels = np.asarray(images)
        keys = [
            self._key(image, prompt)
            for image, prompt in zip(pixels, prompts, strict=True)
        ]
        with self._lock:  # what several threads ask for is asked once
            known = self._read(keys)
            first = {key: n for n, key in enumerate(keys) if key not in known}
            new = sorted(first.values())
            if new:
                measured = self._reward(pixels[new], [prompts[n] for n in new])
                known |= self._add([keys[n] for n in new], measured)
        rows = [known[key] for key in keys]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {
            name: np.array([row.get(name, np.nan) for row in rows], np.float64)
            for name in names
        }

    def _key(self, image: np.ndarray, prompt: Prompt) -> bytes:
        digest = hashlib.sha256(self._config.encode())
        asked = [prompt.text, dict(prompt.metadata)]
        digest.update(json.dumps(asked, sort_keys=True, default=repr).encode())
        digest.update(f"{image.dtype} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        return digest.digest()

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, dict[str, float]]:
        """The measurements of those images that are known."""
        query = "SELECT name, value FROM scores WHERE image = ?"
        try:
            with database.opened(self._path) as table:
                found = {key: dict(table.execute(query, (key,))) for key in keys}
        except database.ERRORS as error:
            raise self._failure(error, "take another file") from error
        return {key: row for key, row in found.items() if row}

    def _add(
        self, keys: Sequence[bytes], measured: Mapping[str, Any]
    ) -> dict[bytes, dict[str, float]]:
        """Write what was measured; an image of which anything is no number is not kept."""
        columns = {name: np.asarray(v, np.float64) for name, v in measured.items()}
        if any(values.shape != (len(keys),) for values in columns.values()):
            raise ValueError(f"not one number for each of {len(keys)} images")
        new = {
            key: {name: float(values[n]) for name, values in columns.items()}
            for n, key in enumerate(keys)
        }
        kept = [
            (key, name, value)
            for key, row in new.items()
            if np.isfinite(list(row.values())).all()
            for name, value in row.items()
        ]
        try:
            with database.opened(self._path) as table:
                table.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", kept)
        except database.ERRORS as error:
            end = "free some space or name another file; what it holds is intact"
            raise self._failure(error, end) from error
        return new

    def _failure(self, error: Exception, end: str) -> UserError:
        return UserError(f"{self._where}: {database.reason(error)}: {end}")
