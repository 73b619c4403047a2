"""SQLite files for what was paid for once: embeddings of prompts, scores of judges.

A connection and a transaction for every use: a killed process leaves what it had
committed, several processes share a file, and nothing is open across a fork.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

_OURS = 0x666C6F77  # PRAGMA application_id of the files that are made here
_WAIT = 60.0  # seconds for the transaction of another process
_PAGE = 1 << 16  # bytes; a row of a megabyte would lie on 400 pages of the default
# What can go wrong with a file: the system's refusals and the library's.
ERRORS = (OSError, sqlite3.Error)


def create(path: Path, tables: Sequence[str]) -> None:
    """Make the file with these CREATE TABLE statements, unless it is there already.

    One of `ERRORS` for a place that cannot be written, and for a file of something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _connected(path) as connection:
        connection.execute(f"PRAGMA page_size = {_PAGE}")
        connection.execute("BEGIN IMMEDIATE")  # of those that begin together, one makes
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        used = connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        if used and owner != _OURS:
            raise sqlite3.DatabaseError("holds tables of another program")
        if not used:
            connection.execute(f"PRAGMA application_id = {_OURS}")
        for table in tables:
            connection.execute(table)


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction of that file: committed at the end, undone if anything is raised.

    One of `ERRORS` for what the disk or the file does not let it do.
    """
    path.stat()  # a file that is gone is not made again, without its tables
    with _connected(path) as connection:
        connection.execute("BEGIN")
        yield connection


def reason(error: Exception) -> str:
    """Why, without the path and the number that the system's own text has."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
    with closing(connection), connection:  # `with connection` commits or rolls back
        yield connection
