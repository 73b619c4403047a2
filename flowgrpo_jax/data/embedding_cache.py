"""Embeddings of prompts on disk: each is computed once, whatever is killed meanwhile.

One SQLite file per kind of embedding (encoders, tokenizers, lengths: the `key`), with a
row for each prompt: its SHA-256, a checksum, the arrays one after another. Rows are
read when they are asked for: a set of prompts may be larger than the memory.
"""

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime import database, paths

_TABLES = (
    "CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS embeddings "
    "(prompt BLOB PRIMARY KEY, checksum INTEGER NOT NULL, arrays BLOB NOT NULL)",
)


@dataclass(frozen=True)
class Field:
    """Shape and type of one array of an embedding, without the prompt axis."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class EmbeddingCache:
    """The embeddings of one `key`, by prompt.

    Args:
      folder: where all caches live; created if need be.
      key: JSON values that determine an embedding, beside its prompt.
      fields: name -> shape and type of its arrays.
    """

    def __init__(
        self, folder: str | Path, key: Mapping[str, Any], fields: Mapping[str, Field]
    ):
        shapes = {n: [list(f.shape), f.dtype.name] for n, f in fields.items()}
        told = json.dumps({"key": key, "fields": shapes}, sort_keys=True)
        self._fields = dict(sorted(fields.items()))
        self.record_bytes = sum(field.size for field in fields.values())
        name = hashlib.sha256(told.encode()).hexdigest()[:20]
        self.path = paths.local(folder) / f"{name}.sqlite"
        with _guarded(self.path):
            database.create(self.path, _TABLES)
            with database.opened(self.path) as rows:
                rows.execute("INSERT OR IGNORE INTO about VALUES (?)", (told,))

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The distinct prompts that have no embedding yet, in order."""
        known = "SELECT 1 FROM embeddings WHERE prompt = ?"
        with _guarded(self.path), database.opened(self.path) as rows:
            return [
                text
                for text in dict.fromkeys(texts)
                if rows.execute(known, (_digest(text),)).fetchone() is None
            ]

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """The right to encode, for one process at a time: runs that start together
        wait for the embeddings of the first, and find them."""
        with _guarded(self.path):
            file = open(self.path.with_suffix(".lock"), "ab")
        with file:
            with _guarded(self.path):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(self, texts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep embeddings [prompt, ...] of these prompts; on disk when it returns.

        UserError if the disk is full; what was there stays.
        """
        added = []
        for number, text in enumerate(texts):
            body = b"".join(
                np.ascontiguousarray(arrays[name][number], field.dtype)
                .reshape(field.shape)
                .tobytes()
                for name, field in self._fields.items()
            )
            added.append((_digest(text), zlib.crc32(body), body))
        try:
            with database.opened(self.path) as rows:
                rows.executemany(
                    "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?)", added
                )
        except database.ERRORS as error:
            raise UserError(
                f"embedding_cache: {self.path}: {database.reason(error)}: a prompt "
                f"takes {self.record_bytes / 1e6:.1f} MB: free some space or name "
                "another folder; what it holds is intact"
            ) from error

    def rows(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays [prompt, ...] of these prompts, in order.

        KeyError for a prompt that is not there, UserError for a damaged record.
        """
        arrays = {
            name: np.empty((len(texts), *field.shape), field.dtype)
            for name, field in self._fields.items()
        }
        found = "SELECT checksum, arrays FROM embeddings WHERE prompt = ?"
        with _guarded(self.path), database.opened(self.path) as rows:
            for number, text in enumerate(texts):
                row = rows.execute(found, (_digest(text),)).fetchone()
                if row is None:
                    raise KeyError(text)
                checksum, body = row
                if len(body) != self.record_bytes or zlib.crc32(body) != checksum:
                    raise UserError(
                        f"embedding_cache: {self.path}: the embedding of {text!r} is "
                        "damaged: delete the file, it will be made again"
                    )
                start = 0
                for name, field in self._fields.items():
                    part = np.frombuffer(body[start : start + field.size], field.dtype)
                    arrays[name][number] = part.reshape(field.shape)
                    start += field.size
        return arrays


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """What the file system or SQLite refuses becomes one line that names the key."""
    try:
        yield
    except database.ERRORS as error:
        raise UserError(
            f"embedding_cache: {path}: {database.reason(error)}: name a folder that "
            "can be written to"
        ) from error


def fingerprint(files: Sequence[Path], folder: str | Path) -> str:
    """SHA-256 of names and contents of files; in `folder` it is kept for next time.

    A file is read again only if its size or time of change is another one.
    """
    known_path = paths.local(folder) / "fingerprints.json"
    try:
        known = dict(json.loads(known_path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}  # it is a memory of work done: what is lost is done again
    whole = hashlib.sha256()
    for path in files:
        status = path.stat()
        place = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if place not in known:
            with open(path, "rb") as file:
                known[place] = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {known[place]}\n".encode())
    partial = known_path.with_suffix(f".{os.getpid()}")
    with _guarded(known_path.parent):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known))
        os.replace(partial, known_path)
    return whole.hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
