"""POST requests to a server that is not trusted: bounded in bytes and seconds, no redirects elsewhere, no key in what comes back.

TLS certificates, proxies and certificate bundles are handled by requests' defaults.
"""

from __future__ import annotations

import base64
import html
import json
import re
import socket
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import requests
import requests.adapters
import urllib3.connection
import urllib3.connectionpool
import urllib3.poolmanager

from megatron_longpo.errors import one_line

_CONNECT_SECONDS = 10.0
_BLOCK_BYTES = 2**16
# Compressed bytes that are decompressed at once.
_COMPRESSED_BLOCK_BYTES = 2**12
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
# Redirects that keep the method and the body.
_KEEPS_POST = (307, 308)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
# Shorter keys ("EMPTY", "none") are placeholders for servers without keys, and words that answers may well contain.
_SHORTEST_SECRET = 8
_HIDDEN = "[key]"


class Temporary(Exception):
    """A request failed for a reason that may pass."""


class Permanent(Exception):
    """A request failed, and would fail again."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: HTTP status.
        text: the body, decoded.
        retry_after: header ``Retry-After``, or None.
        date: header ``Date``, the server's clock, or None.
    """

    status: int
    text: str
    retry_after: str | None
    date: str | None = None


class Scrubber:
    """Takes a key out of texts: plain, as JSON, URL and HTML escape it, in hexadecimal, and in base64 at any alignment.

    Args:
        key: the key, or None.
    """

    def __init__(self, key: str | None) -> None:
        self._pattern: re.Pattern[str] | None = None
        if key is None or len(key) < _SHORTEST_SECRET:
            return
        raw = key.encode()
        escaped = {
            json.dumps(key)[1:-1],
            html.escape(key),
            urllib.parse.quote(key, safe=""),
            urllib.parse.quote_plus(key),
        }
        escaped |= {json.dumps(key)[1:-1].replace("/", "\\/"), "".join(f"\\u{ord(c):04x}" for c in key)}
        forms = {key, *escaped, raw.hex(), raw.hex().upper()}
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for before in range(3):
                # The first and last characters also depend on what stands around the key.
                whole = encode(b"\0" * before + raw).decode().rstrip("=")
                first = (8 * before + 5) // 6
                forms.add(whole[first : 8 * (before + len(raw)) // 6])
        self._pattern = re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """The text with ``[key]`` for the key."""
        return text if self._pattern is None else self._pattern.sub(_HIDDEN, text)


class Client:
    """Sends POST requests to one address. Threads may share it; each has its own connections.

    Args:
        url: the address.
        key: key for the ``Authorization`` header, or None.
        wait_seconds: longest wait for the next byte.
        total_seconds: longest time for a request, from connecting to the last byte.
        max_bytes: largest body in bytes, after decompression.
    """

    def __init__(self, url: str, key: str | None, *, wait_seconds: float, total_seconds: float, max_bytes: int) -> None:
        self.url, self._key = url, key
        self.scrub = Scrubber(key)
        self._wait_seconds, self._total_seconds, self._max_bytes = wait_seconds, total_seconds, max_bytes
        self._sessions = threading.local()

    def post(self, body: dict[str, Any]) -> Answer:
        """Send one request, and follow redirects that stay on the server.

        Raises:
            Temporary: the request failed for a reason that may pass.
            Permanent: the address, the certificate or a redirect cannot be used.
        """
        url = self.url
        for _ in range(_MOST_REDIRECTS + 1):
            answer, location = self._post(url, body)
            if location is None:
                return answer
            url = self._redirected(url, answer.status, location)
        raise Permanent(f"the server redirects more than {_MOST_REDIRECTS} times; check base_url")

    def _redirected(self, url: str, status: int, location: str) -> str:
        """Address of a redirect, if the request may be sent there: prompts hold documents, which go to the named server only."""
        shown = self.shown(location)
        try:
            target = urllib.parse.urljoin(url, location)
            stays = _origin(target) == _origin(url)
        except ValueError:
            stays = False
        if stays and status in _KEEPS_POST:
            return target
        reason = "which loses the prompt" if stays else "another server"
        raise Permanent(f"status {status} redirects to {shown}, {reason}; if that is the server, name it with base_url")

    def _post(self, url: str, body: dict[str, Any]) -> tuple[Answer, str | None]:
        """Send one request; the answer, and where it redirects to."""
        session = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = _Session()
        ends = time.monotonic() + self._total_seconds
        late = Temporary(f"no whole answer within {self._total_seconds:g} s (request_seconds)")
        answered = False
        with session.deadline(self._total_seconds) as expired:
            try:
                response = session.post(
                    url,
                    json=body,
                    auth=self._sign,
                    # Other encodings may grow without bound as they are decoded.
                    headers={"Accept-Encoding": "gzip, deflate"},
                    timeout=(_CONNECT_SECONDS, min(self._wait_seconds, self._total_seconds)),
                    allow_redirects=False,
                    stream=True,
                )
                with response:
                    location = response.headers.get("Location") if response.status_code in _REDIRECTS else None
                    content = b"" if location is not None else self._read(response, ends)
                answered = not expired.is_set() and time.monotonic() < ends
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
                raise Permanent(f"is not a valid URL ({type(error).__name__}); check base_url") from None
            except requests.exceptions.SSLError as error:
                detail = self._detail(error)
                if "CERTIFICATE_VERIFY_FAILED" in detail:
                    raise Permanent(
                        f"its TLS certificate is refused ({detail}); for a certificate authority of your own set "
                        "REQUESTS_CA_BUNDLE, or check base_url"
                    ) from None
                raise (late if expired.is_set() else Temporary(f"TLS failed ({detail})")) from None
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError, zlib.error) as error:
                if isinstance(error, ValueError) and not isinstance(error, (requests.RequestException, OSError)):
                    raise Permanent(f"is not a valid URL ({type(error).__name__}); check base_url") from None
                raise (
                    late if expired.is_set() else Temporary(f"{type(error).__name__}: {self._detail(error)}")
                ) from None
            finally:
                if not answered or location is not None:
                    # A connection that failed, or has an unread body, is not used again.
                    self._sessions.session = None
                    session.close()
        if not answered:
            # A body without a length ends like a whole one when its connection is cut.
            raise late
        # JSON is UTF-8, even if the headers do not say so.
        text = content.decode("utf-8", errors="replace")
        headers = response.headers
        return Answer(response.status_code, text, headers.get("Retry-After"), headers.get("Date")), location

    def _read(self, response: requests.Response, ends: float) -> bytes:
        """The body, decompressed; both kinds of bytes are counted."""
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Temporary("a body in an encoding that was not asked for")
        decoder = None if encoding in ("", "identity") else zlib.decompressobj(_GZIP_OR_ZLIB)
        block = _BLOCK_BYTES if decoder is None else _COMPRESSED_BLOCK_BYTES
        too_large = Temporary(f"a body of more than {self._max_bytes} bytes (max_reply_bytes)")
        content = bytearray()
        read = 0
        while piece := response.raw.read(block, decode_content=False):
            read += len(piece)
            content += piece if decoder is None else decoder.decompress(piece)
            if max(read, len(content)) > self._max_bytes:
                raise too_large
            if time.monotonic() > ends:
                break
        if decoder is not None and content and not decoder.eof:
            raise Temporary("a body that ends early")
        return bytes(content)

    def _sign(self, request: Any) -> Any:
        # Passed as an authentication of requests, so that no .netrc replaces the key.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _detail(self, error: BaseException) -> str:
        """What failed, without the pool and the address around it."""
        reason: Any = error
        while isinstance(reason, BaseException) and reason.args:
            inner = getattr(reason, "reason", None)
            if not isinstance(inner, BaseException):
                inner = reason.args[0]
            if not isinstance(inner, BaseException):
                break
            reason = inner
        # urllib3 names its own connection object before the operating system's words.
        if isinstance(reason, urllib3.exceptions.HTTPError) and isinstance(reason.__cause__, OSError):
            reason = reason.__cause__
        return self.shown(str(reason))

    def shown(self, text: str) -> str:
        """A text of the server for a message: without the key and without control characters, on one line, shortened."""
        # Cleared of the key before it is shortened, or half of it would stay.
        return "".join(c if c.isprintable() else "?" for c in one_line(self.scrub(text)))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


# --------------------------------------------------------------------------------------------------
# Deadlines
# --------------------------------------------------------------------------------------------------

# A server that sends a byte now and then, or one interim answer after the other, never exceeds the wait for the next byte. So at
# the deadline a timer shuts the connections of the request's session down, which ends whatever it waits for: the TLS handshake,
# the headers or the body.
_opening = threading.local()


def _remember(opened: socket.socket) -> socket.socket:
    """Note a connection of this thread's session. A duplicate is noted, since TLS takes the socket itself over."""
    sockets: list[socket.socket] | None = getattr(_opening, "sockets", None)
    if sockets is not None:
        sockets.append(opened.dup())
    return opened


class _Connection(urllib3.connection.HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _remember(super()._new_conn())


class _TLSConnection(urllib3.connection.HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _remember(super()._new_conn())


class _Pool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        super().init_poolmanager(*args, **keywords)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **keywords: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **keywords)
        if not proxy.lower().startswith("socks"):
            cast(Any, manager).pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


class _Session(requests.Session):
    """A session of one thread whose connections can be cut at a deadline."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: list[socket.socket] = []
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: requests would read the body of a redirect, of any size, and parse its address, even where it follows none."""

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[threading.Event]:
        """Cut the session's connections after some seconds; the event says that they were cut."""
        expired = threading.Event()

        def cut() -> None:
            expired.set()
            for connection in tuple(self._sockets):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        _opening.sockets = self._sockets
        try:
            yield expired
        finally:
            timer.cancel()
            _opening.sockets = None

    def close(self) -> None:
        super().close()
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()
