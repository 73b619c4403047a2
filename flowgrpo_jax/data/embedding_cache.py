"""Embeddings of prompts on disk: each is computed once, whatever is killed meanwhile.

One file per kind of embedding (encoders, tokenizers, lengths: the `key`), made of
records of one size: the SHA-256 of the prompt, a checksum, then the arrays. Records are
only ever appended, so a killed writer leaves at most a torn last one, which the next
writer cuts off. Rows are read through a memory map: a set of prompts may be larger than
the memory.
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
from flowgrpo_jax.runtime import paths

_DIGEST = 32
_HEAD = _DIGEST + 4  # and a CRC-32 of the arrays


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
        self.record_bytes = _HEAD + sum(field.size for field in fields.values())
        name = hashlib.sha256(told.encode()).hexdigest()[:20]
        self.path = paths.local(folder) / f"{name}.embeddings"
        with _guarded(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.path.with_suffix(".json").write_text(told + "\n")
        self._row: dict[bytes, int] = {}
        self._map = np.zeros((0, self.record_bytes), np.uint8)
        self._look()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The distinct prompts that have no embedding yet, in order."""
        self._look()
        return [t for t in dict.fromkeys(texts) if _digest(t) not in self._row]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The right to `add`, for one process at a time; cuts off a torn record."""
        with _guarded(self.path):
            file = open(self.path, "r+b")
        with file:
            with _guarded(self.path):
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file.fileno()).st_size
                file.truncate(size - size % self.record_bytes)
            yield

    def add(self, texts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Append embeddings [prompt, ...] of these prompts; on disk when it returns.

        Call it inside `writing`. UserError if the disk is full; what was there stays.
        """
        records = bytearray()
        for number, text in enumerate(texts):
            body = b"".join(
                np.ascontiguousarray(arrays[name][number], field.dtype)
                .reshape(field.shape)
                .tobytes()
                for name, field in self._fields.items()
            )
            records += _digest(text) + zlib.crc32(body).to_bytes(4, "little") + body
        try:
            with open(self.path, "ab") as file:
                file.write(records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"embedding_cache: {self.path}: {error.strerror}: a prompt takes "
                f"{self.record_bytes / 1e6:.1f} MB: free some space or name another "
                "folder; what it holds is intact"
            ) from error

    def rows(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays [prompt, ...] of these prompts, in order.

        KeyError for a prompt that is not there, UserError for a damaged record.
        """
        if any(_digest(text) not in self._row for text in texts):
            self._look()
        records = self._map[[self._row[_digest(text)] for text in texts]]
        for text, record in zip(texts, records, strict=True):
            if zlib.crc32(record[_HEAD:]) != int.from_bytes(
                record[_DIGEST:_HEAD].tobytes(), "little"
            ):
                raise UserError(
                    f"embedding_cache: {self.path}: the embedding of {text!r} is "
                    "damaged: delete the file, it will be made again"
                )
        arrays, start = {}, _HEAD
        for name, field in self._fields.items():
            part = np.ascontiguousarray(records[:, start : start + field.size])
            arrays[name] = part.view(field.dtype).reshape(len(texts), *field.shape)
            start += field.size
        return arrays

    def _look(self) -> None:
        """Take note of records that were appended, here or by another process."""
        with _guarded(self.path):
            count = self.path.stat().st_size // self.record_bytes
        if count <= len(self._map):
            return
        shape = (count, self.record_bytes)
        known = len(self._map)
        self._map = np.memmap(self.path, np.uint8, mode="r", shape=shape)
        digests = self._map[known:, :_DIGEST]
        self._row |= {row.tobytes(): known + n for n, row in enumerate(digests)}


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """What the file system refuses becomes one line that names the key."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"embedding_cache: {path}: {error.strerror or error}: name a folder that "
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
