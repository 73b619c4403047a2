"""Serves the page of a run on this machine alone, always as new as the workdir."""

import hashlib
import http.server
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report import page

_HOST = "127.0.0.1"
_FILES = re.compile(r"/(samples/iteration_\d+\.png|compare\.html|metrics\.jsonl)")
_TYPES = {
    ".png": "image/png",
    ".html": "text/html; charset=utf-8",
    ".jsonl": "text/plain; charset=utf-8",
}


class Server(http.server.ThreadingHTTPServer):
    """`/` is the page, `/version` a word that changes with it, a few files beside.

    Port 0 takes any free one: `url` says which. UserError for one that is taken.
    """

    daemon_threads = True

    def __init__(self, workdirs: Sequence[Path], port: int):
        self.workdirs = [Path(workdir) for workdir in workdirs]
        self._lock = threading.Lock()
        self._page = ("", b"")  # version, and the page of it
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"--port: {port}: {reason}: give another one") from error

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.server_address[1]}/"

    def version(self) -> str:
        """Changes when a row, a picture or the config is written."""
        found = hashlib.sha256()
        for workdir in self.workdirs:
            for file in (
                *(workdir / name for name in ("config.json", "metrics.jsonl")),
                *sorted((workdir / "samples").glob("*.png")),
            ):
                if file.exists():
                    told = file.stat()
                    found.update(f"{file} {told.st_size} {told.st_mtime_ns}\n".encode())
        return found.hexdigest()[:16]

    def page(self) -> bytes:
        """The page of this moment; made once for each version."""
        with self._lock:
            version = self.version()
            if self._page[0] != version:
                text = page.render_page(self.workdirs, self.workdirs[0], version)
                self._page = (version, text.encode())
            return self._page[1]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 30.0

    def do_GET(self) -> None:
        # Pages of other sites reach this address under a name of theirs.
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if name not in (_HOST, "localhost"):
            return self._answer(403, b"only as localhost\n", _TYPES[".jsonl"])
        try:
            if self.path in ("/", "/index.html"):
                return self._answer(200, self.server.page(), _TYPES[".html"])
            if self.path == "/version":
                return self._answer(
                    200, self.server.version().encode(), _TYPES[".jsonl"]
                )
            if _FILES.fullmatch(self.path):
                file = self.server.workdirs[0] / self.path[1:]
                return self._answer(200, file.read_bytes(), _TYPES[file.suffix])
        except (UserError, OSError) as error:
            return self._answer(503, f"{error}\n".encode(), _TYPES[".jsonl"])
        return self._answer(404, b"not here\n", _TYPES[".jsonl"])

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing of requests."""
