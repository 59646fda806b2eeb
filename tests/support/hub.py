"""A model hub on this machine, with as much of the Hugging Face Hub's interface as its client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, name: str, revision: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a model.

    Args:
        folder: the model's files.
        name: its name, ``org/name``.
        revision: its only tag, beside ``main`` and its commit.

    Yields:
        The hub's address, and the names of the files that were downloaded so far.
    """
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            about, tree = f"/api/models/{name}/revision/", f"/api/models/{name}/tree/"
            known = path.rsplit("/", 1)[1] in (revision, "main", COMMIT)
            if path.startswith((about, tree)) and not known:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(about):
                siblings = [{"rfilename": file} for file in files]
                self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(tree):
                entries = [
                    {"type": "file", "path": file, "size": f.stat().st_size, "oid": "0" * 40}
                    for file, f in files.items()
                ]
                self._send(200, json.dumps(entries).encode())
            elif path.startswith(f"/{name}/resolve/"):
                file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                content = files[file].read_bytes()
                if self.command == "GET":
                    downloaded.append(file)
                tag = hashlib.sha256(content).hexdigest()
                self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for header, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
