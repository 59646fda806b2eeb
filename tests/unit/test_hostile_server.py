"""The openai engine against servers that echo the key, redirect, drip, never end, or lie about what they send."""

from __future__ import annotations

import base64
import gzip
import html
import json
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.engines.base import EngineError, Prompt, Reply, Sampling
from megatron_longpo.engines.http_client import Scrubber
from megatron_longpo.engines.openai_engine import OpenAIEngine
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.errors import ConfigError
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer

KEY = "sk-SECRET/+ \"key&'0123456789"
PROMPT = "the whole document"
# Longest time that any of these servers may hold a request; the wait for the next byte alone never ends them.
SECONDS = 3.0

Behaviour = Callable[[socket.socket, bytes], None]


class Server:
    """Answers each connection by a function of the socket and the request; keeps the requests."""

    def __init__(self, behave: Behaviour, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._behave, self._context = behave, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(10)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            while len(body) < int(fields.get(b"content-length", b"0")):
                body += connection.recv(65536)
            self.requests.append(head + b"\r\n\r\n" + body)
            self._behave(connection, request)
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_fast_tokenizer(folder)
    make_chat_model(folder)
    return folder


@pytest.fixture
def serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[OpenAIEngine, Server]]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("megatron_longpo.engines.openai_engine._BASE_PAUSE_SECONDS", 0.01)
    servers = []

    def make(
        behave: Behaviour, *, context: ssl.SSLContext | None = None, **settings: Any
    ) -> tuple[OpenAIEngine, Server]:
        server = Server(behave, context)
        servers.append(server)
        scheme = "http" if context is None else "https"
        base_url = settings.pop("base_url", f"{scheme}://127.0.0.1:{server.port}/v1")
        settings = {"retries": 0, "timeout_seconds": 2.0, "request_seconds": SECONDS / 2, **settings}
        config = EngineConfig(engine="openai", model="m", tokenizer=str(model), base_url=base_url, **settings)
        return OpenAIEngine(config), server

    yield make
    for server in servers:
        server.close()


def ask(engine: OpenAIEngine) -> Reply:
    ((reply,),) = engine.answer([[Prompt(({"role": "user", "content": PROMPT},))]], Sampling(5))
    return reply


def response(status: int, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    fields = {"Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


def sends(content: bytes) -> Behaviour:
    return lambda connection, request: connection.sendall(content)


def completion(text: str, usage: Any = None) -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 2} if usage is None else usage
    return json.dumps({"choices": [choice], "usage": usage}).encode()


# --------------------------------------------------------------------------------------------------
# The key
# --------------------------------------------------------------------------------------------------

FORMS = {
    "plain": KEY,
    "JSON": json.dumps(KEY)[1:-1],
    "JSON with escaped slashes": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "JSON, all escapes": "".join(f"\\u{ord(c):04X}" for c in KEY),
    "URL": urllib.parse.quote(KEY, safe=""),
    "form": urllib.parse.quote_plus(KEY),
    "HTML": html.escape(KEY),
    "hexadecimal": KEY.encode().hex(),
    "lower case": KEY.lower(),
}
ENCODED = {
    f"base64 of {before!r} and the key": encode(f"{before}{KEY}\n".encode()).decode()
    for before in ("", "x", "Bearer ", "Authorization: Bearer ")
    for encode in (base64.b64encode, base64.urlsafe_b64encode)
}


@pytest.mark.parametrize("form", [*FORMS, *ENCODED])
def test_a_key_is_found_in_every_form(form: str) -> None:
    text = {**FORMS, **ENCODED}[form]
    scrubbed = Scrubber(KEY)(f"before {text} after")
    assert "[key]" in scrubbed and scrubbed.startswith("before ") and scrubbed.endswith(" after")
    secret = text if form in FORMS else text[8:-8]
    assert secret not in scrubbed
    assert len(scrubbed) <= len("before  after[key]") + (0 if form in FORMS else 40)


def test_placeholders_are_no_keys() -> None:
    for placeholder in (None, "", "EMPTY", "none"):
        assert Scrubber(placeholder)("EMPTY is none of these") == "EMPTY is none of these"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418])
def test_an_error_that_echoes_the_key_does_not_show_it(serve: Any, status: int) -> None:
    body = ("x" * 280 + f'{{"error": "bad key Bearer {KEY}"}}\x1b[31m').encode()
    engine, server = serve(sends(response(status, body)))
    with pytest.raises(EngineError) as caught:
        ask(engine)
    assert "SECRET" not in str(caught.value) and "sk-" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert f"Bearer {KEY}".encode() in server.requests[0]


@pytest.mark.parametrize("form", ["plain", "JSON", "URL"])
def test_refusals_and_answers_that_echo_the_key_do_not_keep_it(serve: Any, form: str) -> None:
    engine, _ = serve(sends(response(400, f"context too long for {FORMS[form]}".encode())))
    reply = ask(engine)
    assert reply.refused == "status 400: context too long for [key]"
    engine, _ = serve(sends(response(200, completion(f"Your key is {FORMS[form]}!"))))
    assert ask(engine).text == "Your key is [key]!"


def test_an_address_with_the_key_is_refused(serve: Any) -> None:
    for base_url in (f"http://127.0.0.1:1/v1?key={KEY}", f"http://127.0.0.1:1/{urllib.parse.quote(KEY, safe='')}/v1"):
        with pytest.raises(ConfigError, match="base_url holds the key of OPENAI_API_KEY") as caught:
            serve(sends(b""), base_url=base_url)
        assert "SECRET" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Redirects
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["host", "port", "scheme", "userinfo", "file", "//", "bad"])
def test_no_redirect_leaves_the_server(serve: Any, status: int, target: str) -> None:
    _, other = serve(sends(response(200, completion("from elsewhere"))))

    def behave(connection: socket.socket, request: bytes) -> None:
        own = connection.getsockname()[1]
        location = {
            "host": f"http://localhost:{own}/v1",
            "port": f"http://127.0.0.1:{other.port}/v1",
            "scheme": f"https://127.0.0.1:{own}/v1",
            "userinfo": f"http://127.0.0.1:{own}@127.0.0.1:{other.port}/",
            "file": "file:///etc/passwd",
            "//": f"//127.0.0.1:{other.port}/v1",
            "bad": "http://[::1/v1",
        }[target]
        connection.sendall(response(status, b"", {"Location": location}))

    engine, server = serve(behave, retries=3)
    with pytest.raises(EngineError, match=rf"status {status} redirects to \S+, another server; .* base_url"):
        ask(engine)
    assert not other.requests and len(server.requests) == 1


def test_a_redirect_on_the_server_keeps_the_request(serve: Any) -> None:
    def behave(connection: socket.socket, request: bytes) -> None:
        if request.startswith(b"POST /v1/"):
            connection.sendall(response(308, b"moved", {"Location": "/v2/chat/completions"}))
        else:
            connection.sendall(response(200, completion("moved")))

    engine, server = serve(behave)
    assert ask(engine).text == "moved"
    assert [r.split(b" ")[1] for r in server.requests] == [b"/v1/chat/completions", b"/v2/chat/completions"]
    assert all(PROMPT.encode() in r and KEY.encode() in r for r in server.requests)
    for status in (301, 302, 303):
        engine, _ = serve(sends(response(status, b"", {"Location": "/v2"})))
        with pytest.raises(EngineError, match=rf"status {status} redirects to /v2, which loses the prompt"):
            ask(engine)
    engine, server = serve(sends(response(307, b"", {"Location": f"?{KEY}"})))
    with pytest.raises(EngineError, match="redirects more than 5 times"):
        ask(engine)
    assert len(server.requests) == 6


# --------------------------------------------------------------------------------------------------
# Bytes and seconds
# --------------------------------------------------------------------------------------------------


def forever(connection: socket.socket, piece: bytes, pause: float) -> None:
    """Send a piece again and again, until the other side hangs up."""
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        connection.sendall(piece)
        time.sleep(pause)


DRIPS = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "status line": (b"HTTP/1.1 2", b"0"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body with a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
    "body without one": (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "length of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "error": (b"HTTP/1.1 500 X\r\nContent-Length: 9999\r\n\r\n", b" "),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("drip", list(DRIPS))
def test_a_drip_ends_at_the_deadline(serve: Any, drip: str) -> None:
    begin, piece = DRIPS[drip]

    def behave(connection: socket.socket, request: bytes) -> None:
        connection.sendall(begin)
        forever(connection, piece, 0.05)

    engine, _ = serve(behave, request_seconds=0.7)
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"no answer after 1 tries \(the last: (no whole answer within 0.7 s|ReadTimeout)"
    ):
        ask(engine)
    assert time.monotonic() - began < SECONDS


def test_a_tls_handshake_that_drips_ends_at_the_deadline(serve: Any) -> None:
    def accept(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        # A handshake record of 16 KB, a byte at a time.
        try:
            connection.sendall(b"\x16\x03\x03\x40\x00")
            forever(connection, b"\x02", 0.05)
        except OSError:
            pass

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    engine, _ = serve(sends(b""), base_url=f"https://127.0.0.1:{listener.getsockname()[1]}/v1", request_seconds=0.7)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no whole answer within 0.7 s|SSL"):
        ask(engine)
    assert time.monotonic() - began < SECONDS
    listener.close()


def test_a_deadline_that_passed_spoils_no_later_request(serve: Any) -> None:
    calls = []

    def behave(connection: socket.socket, request: bytes) -> None:
        calls.append(1)
        if len(calls) == 1:
            forever(connection, b"HTTP/1.1 100 Continue\r\n\r\n", 0.05)
        connection.sendall(response(200, completion("yes")))

    engine, _ = serve(behave, request_seconds=0.5, retries=1, concurrency=1)
    assert ask(engine).text == "yes" and len(calls) == 2
    time.sleep(0.7)
    assert ask(engine).text == "yes"


BOMBS = {
    "endless": (b"HTTP/1.1 200 OK\r\n\r\n", b"0" * 2**16),
    "endless chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"0" * 2**16 + b"\r\n"),
    "gzip": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", gzip.compress(bytes(2**27))),
    "deflate": (b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n\r\n", zlib.compress(bytes(2**27))),
    "error": (b"HTTP/1.1 404 OK\r\n\r\n", b"0" * 2**16),
    "redirect": (b"HTTP/1.1 307 OK\r\nLocation: //other/\r\n\r\n", b"0" * 2**16),
}


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_an_answer_costs_no_more_than_its_limit(serve: Any, bomb: str) -> None:
    import tracemalloc

    def behave(connection: socket.socket, request: bytes) -> None:
        connection.sendall(BOMBS[bomb][0])
        forever(connection, BOMBS[bomb][1], 0)

    engine, _ = serve(behave, max_reply_bytes=10**6, request_seconds=20.0)
    tracemalloc.start()
    with pytest.raises(EngineError, match=r"a body of more than 1000000 bytes \(max_reply_bytes\)|another server"):
        ask(engine)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_compressed_answers_are_read(serve: Any) -> None:
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        packed = pack(completion("packed"))
        engine, _ = serve(sends(response(200, packed, {"Content-Encoding": encoding})))
        assert ask(engine).text == "packed"
        engine, _ = serve(sends(response(200, packed[:-9], {"Content-Encoding": encoding})))
        with pytest.raises(EngineError, match="a body that ends early"):
            ask(engine)
    for encoding in ("br", "zstd", "gzip, gzip"):
        engine, _ = serve(sends(response(200, b"x", {"Content-Encoding": encoding})))
        with pytest.raises(EngineError, match="an encoding that was not asked for"):
            ask(engine)


# --------------------------------------------------------------------------------------------------
# Numbers, waits, certificates
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    ['{"prompt_tokens": 1%s, "completion_tokens": 2}' % ("0" * 400)]
    + [f'{{"prompt_tokens": 5, "completion_tokens": {n}}}' for n in ("-1", "NaN", "1e999", '"2"', "true", "[2]", "2e9")]
    + ["[]", "{}", "7", '"x"'],
)  # fmt: skip
def test_counts_that_cannot_be_are_counted_again(serve: Any, usage: str) -> None:
    body = completion("Yes.").replace(b'{"prompt_tokens": 7, "completion_tokens": 2}', usage.encode())
    engine, _ = serve(sends(response(200, body)))
    if usage in ("7", '"x"'):
        with pytest.raises(EngineError, match="a body that is not a completion"):
            ask(engine)
        return
    try:
        reply = ask(engine)
    except EngineError as error:
        assert "a body that is not a completion" in str(error)
        return
    assert reply.text == "Yes."
    assert (reply.prompt_tokens, reply.new_tokens) == (
        len(engine.tokenizer.prompt([{"role": "user", "content": PROMPT}])),
        len(engine.tokenizer.encode("Yes.", continues=False)),
    )


@pytest.mark.parametrize(
    "body", [b"<html>", b"[" * 10**5, b'{"choices": ' + b"[" * 200, b"\xff\xfe", b"null", b"1" * 5000]
)
def test_bodies_that_are_no_completions_are_temporary(serve: Any, body: bytes) -> None:
    engine, _ = serve(sends(response(200, body)))
    with pytest.raises(EngineError, match="a body that is not a completion"):
        ask(engine)


def test_a_wish_to_wait_is_bounded_and_logged(serve: Any, capfd: pytest.CaptureFixture[str]) -> None:
    engine, server = serve(
        lambda connection, request: connection.sendall(
            response(429, b"", {"Retry-After": "1e9"})
            if len(server.requests) == 1
            else response(200, completion("yes"))
        ),
        retries=2,
        retry_after_seconds=1.2,
    )
    began = time.monotonic()
    assert ask(engine).text == "yes"
    assert 1.2 <= time.monotonic() - began < 2 * SECONDS
    shown = capfd.readouterr()
    assert "the server asks to wait 1e+09 s, of which 1 s are granted (Retry-After)" in shown.out + shown.err


@pytest.mark.parametrize(
    ("date", "until", "seconds"),
    [
        # This machine's clock is years away from both.
        ("Fri, 01 Jan 1999 00:00:00 GMT", "Fri, 01 Jan 1999 00:00:01 GMT", 1.0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:01 GMT", 1.0),
        ("Fri, 01 Jan 1999 00:00:09 GMT", "Fri, 01 Jan 1999 00:00:01 GMT", 0.0),
        (None, "Fri, 31 Dec 9999 23:59:59 GMT", 0.0),
        ("nonsense", "Fri, 31 Dec 9999 23:59:59 GMT", 0.0),
        ("Fri, 01 Jan 1999 00:00:00 GMT", "Fri, 32 Dec 99999 23:59:59", 0.0),
    ],
)
def test_a_date_to_wait_for_is_on_the_servers_clock(serve: Any, date: str | None, until: str, seconds: float) -> None:
    headers = {"Retry-After": until} | ({} if date is None else {"Date": date})
    engine, server = serve(
        lambda connection, request: connection.sendall(
            response(429, b"", headers) if len(server.requests) == 1 else response(200, completion("yes"))
        ),
        retries=1,
        retry_after_seconds=60.0,
    )
    began = time.monotonic()
    assert ask(engine).text == "yes"
    assert seconds <= time.monotonic() - began < seconds + 20


def test_a_certificate_that_nobody_signed_is_refused_by_name(serve: Any, tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    engine, server = serve(sends(response(200, completion("yes"))), context=context, retries=5)
    with pytest.raises(EngineError, match=r"TLS certificate is refused \(.*self.signed.*REQUESTS_CA_BUNDLE"):
        ask(engine)
    assert not server.requests
    # A server that does not speak TLS at all.
    engine, _ = serve(sends(b""))
    engine, _ = serve(sends(b""), base_url=engine._url.replace("http:", "https:").removesuffix("/chat/completions"))
    with pytest.raises(EngineError, match=r"the last: (TLS failed|no whole answer|ConnectionError)"):
        ask(engine)
