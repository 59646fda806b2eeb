"""A proxy that mistreats its clients: it drops connections, answers 429 and 500, cuts bodies short, stalls."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The same request fails at most so often.
_MOST_FAILURES = 4


class FlakyProxy:
    """Serves on a free port of 127.0.0.1 until closed; ``counts`` holds how often it did what.

    Args:
        upstream: URL of the server behind it.
        seed: seed of the misbehaviour.
        stall_seconds: how long a stalled client is kept waiting.
    """

    def __init__(self, upstream: str, *, seed: int = 0, stall_seconds: float = 30.0) -> None:
        self.counts: Counter[str] = Counter()
        self._failures: Counter[bytes] = Counter()
        self.authorizations: set[str | None] = set()
        rng, lock = random.Random(seed), threading.Lock()
        proxy = self
        self._closed = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    proxy.authorizations.add(self.headers.get("Authorization"))
                    draw = rng.random()
                    limits = (
                        ("drop", 0.2),
                        ("429", 0.3),
                        ("500", 0.4),
                        ("cut", 0.5),
                        ("garbage", 0.55),
                        ("stall", 0.58),
                    )
                    what = next((name for name, limit in limits if draw < limit), "pass")
                    # The client's pauses double: one unlucky request would be most of a test's time.
                    if proxy._failures[body] == _MOST_FAILURES:
                        what = "pass"
                    proxy._failures[body] += what != "pass"
                    proxy.counts[what] += 1
                if what == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                if what == "stall":
                    proxy._closed.wait(stall_seconds)
                    self.close_connection = True
                    return
                if what in ("429", "500"):
                    self._send(int(what), b"not now", {"Retry-After": "0.3"} if what == "429" else {})
                    return
                request = urllib.request.Request(upstream + self.path, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=120) as answer:
                    content = answer.read()
                if what == "garbage":
                    self._send(200, content[: len(content) // 2], {})
                    return
                self._send(200, content, {}, cut=what == "cut")

            def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


def wait_until_up(url: str, seconds: float) -> None:
    """Wait until a server answers; raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(url)
