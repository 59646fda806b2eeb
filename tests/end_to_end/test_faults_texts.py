"""Hostile and damaged texts and servers, by the command line: one line that names the fault, in bounded time and memory.

A server here is a thread of the test on 127.0.0.1. The units are in tests/unit: test_reading, test_hostile_server,
test_template_guard, test_damage.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import command, environment, run
from tests.support.models import make_chat_model
from tests.support.tokenizers import WORDS, make_fast_tokenizer

KEY = "sk-SECRET-0123456789"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_fast_tokenizer(folder / "model")
    make_chat_model(folder / "model")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(2):
        text = "\n\n".join(" ".join(rng.choices(WORDS, k=40)) + "." for _ in range(12))
        (folder / "texts" / f"{number}.txt").write_text(text)
    return folder


def row(turns: int = 1, text: str = "The tower stands by the river.") -> dict[str, Any]:
    turn = {"instruction": "Where?", "short_context": text, "chosen": "By the river.", "rejected": "Nowhere."}
    return {"context": f"{text} It is old.", "turns": [turn] * turns}


def preprocess(made: Path, folder: Path, source: Path, *, expect: int, **flags: Any) -> str:
    line = command("preprocess", input=source, tokenizer=made / "model", output_prefix=folder / "data", **flags)
    done = run(line, expect=expect)
    return one_error(done.stderr) if expect else str(done.stdout) + str(done.stderr)


def one_error(stderr: str) -> str:
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


# --------------------------------------------------------------------------------------------------
# Preprocessing
# --------------------------------------------------------------------------------------------------


def test_a_bomb_in_the_input_is_refused(made: Path, tmp_path: Path) -> None:
    """B9. 25 members of 16 MB each: 400 MB of one line."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"0" * 2**24) * 25)
    began = time.monotonic()
    error = preprocess(made, tmp_path, path, expect=2)
    assert "bomb.jsonl.gz: it decompresses to more than 268435456 bytes" in error and "raise max_expansion" in error
    assert time.monotonic() - began < 60


def test_rows_beyond_a_limit_are_skipped_with_their_numbers(made: Path, tmp_path: Path) -> None:
    """B10, B11, B12: one line of 70 MB, a row of many turns, deep JSON; the good rows around them are kept."""
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as stream:
        for raw in (
            json.dumps(row()).encode(),
            b'{"context": "' + b"a" * 70_000_000 + b'"}',
            json.dumps(row(turns=4001)).encode(),
            b'{"context": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            json.dumps(row(turns=100)).encode(),
        ):
            stream.write(raw + b"\n")
    preprocess(made, tmp_path, path, expect=0)
    rejects = [json.loads(line) for line in (tmp_path / "data.rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == [(2, "row_too_large"), (3, "too_many_turns"), (4, "not_json")]
    assert "70000016 bytes; max_row_bytes is 67108864" in rejects[0]["detail"]
    manifest = json.loads((tmp_path / "data.json").read_text())
    assert (manifest["samples"], manifest["turns"]) == (2, 101)
    # Each limit can be changed.
    flags = {"max_turns": 50, "max_row_bytes": 100_000_000, "restart": True}
    preprocess(made, tmp_path, path, expect=0, **flags)
    manifest = json.loads((tmp_path / "data.json").read_text())
    assert manifest["rejected"] == {"no_turn": 1, "too_many_turns": 2, "not_json": 1}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m", "does not render a short conversation (line 1: TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.5 s"),
        ("{{ 'x' * 10000000000 }}", "takes more than 2 GiB of memory"),
        ("{{ 9 ** 9 ** 9 }}", "computes powers"),
    ],
    ids=["syntax", "attributes", "loops", "size", "powers"],
)
def test_a_template_that_does_not_work_is_named_at_once(
    made: Path, tmp_path: Path, template: str, message: str
) -> None:
    """B17, B18."""
    (tmp_path / "template").write_text(template)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()))
    flags = {"chat_template": tmp_path / "template", "template_seconds": 0.5}
    error = preprocess(made, tmp_path, tmp_path / "rows.jsonl", expect=2, **flags)
    assert message in error and f"--chat-template {tmp_path / 'template'}" in error
    assert not (tmp_path / "data.rejects.jsonl").exists()


def test_inputs_that_are_no_files_are_named(made: Path, tmp_path: Path) -> None:
    """B13, B14."""
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "itself.jsonl").symlink_to("itself.jsonl")
    assert "is a FIFO, not a regular file" in preprocess(made, tmp_path, tmp_path / "fifo.jsonl", expect=2)
    assert "is a device, not a regular file" in preprocess(made, tmp_path, tmp_path / "zero.jsonl", expect=2)
    assert "itself.jsonl" in preprocess(made, tmp_path, tmp_path / "itself.jsonl", expect=2)
    line = command("evaluate", tasks="ruler", ruler_tasks="qa_1", model=made / "model", output=tmp_path / "out")
    done = run([*line, "--squad", str(tmp_path / "fifo.jsonl")], expect=2)
    assert "fifo.jsonl: cannot be read (is a FIFO, not a regular file)" in one_error(done.stderr)
    (tmp_path / "deep.json").write_text("[" * 10**6)
    done = run([*line, "--squad", str(tmp_path / "deep.json")], expect=2)
    assert "deep.json: is not JSON (is nested more than 64 levels deep; see max_json_depth)" in one_error(done.stderr)


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------


class _Echo(BaseHTTPRequestHandler):
    """Answers with the key that it was sent, or as the server's ``mode`` says."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.bodies.append(body)
        key = self.headers["Authorization"].removeprefix("Bearer ")
        if server.mode == "refuse":
            self._send(401, f"bad key {key}".encode())
        elif server.mode == "elsewhere":
            self._send(307, b"", Location=f"http://localhost:{server.server_address[1]}/v1")
        elif server.mode == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(200):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif b"Number them" in body:
            self._answer(f"1. What does the key {key} open in here?")
        elif len(body) > 1500:
            self._send(400, f"too long for the key {key}".encode())
        else:
            self._answer(f"The key is {key} and this is answer {len(server.bodies)}.")

    def _answer(self, text: str) -> None:
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        self._send(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10**400}}).encode())

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def echo() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.mode, server.bodies, server.daemon_threads = "answer", [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def generate(made: Path, folder: Path, server: Any, **arguments: Any) -> str:
    """A generation that fails, and its error."""
    return one_error(run_generation(made, folder, server, **arguments).stderr)


def generate_refused(made: Path, folder: Path, server: Any, **arguments: Any) -> str:
    """A generation that runs to its end, and what it printed. The server refuses long prompts, so no sample is made."""
    done = run_generation(made, folder, server, **arguments)
    assert "pairs.jsonl: no sample was made" in one_error(done.stderr) and "prompt_refused" in done.stdout
    assert (folder / "pairs.jsonl").read_text() == ""
    return str(done.stdout)


def run_generation(made: Path, folder: Path, server: Any, *, documents: Path, expect: int = 2, **flags: Any) -> Any:
    line = command(
        "generate", documents=documents, output=folder / "pairs.jsonl", engine="openai", model="m",
        tokenizer=made / "model", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", seq_length=1200,
        min_chunk_tokens=100, max_chunk_tokens=300, min_document_tokens=0, chunks_per_document=1, answer_tokens=16,
        questions_per_chunk=1, max_quoted_words=1.0, **flags,
    )  # fmt: skip
    done = run(line, expect=expect, env=environment(OPENAI_API_KEY=KEY))
    assert KEY not in done.stdout + done.stderr
    return done


def assert_no_key(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_an_echoed_key_is_neither_shown_nor_kept(made: Path, tmp_path: Path, echo: Any) -> None:
    """C1, C2, C8."""
    said = generate_refused(made, tmp_path, echo, documents=made / "texts")
    assert "documents" in said and echo.bodies
    assert_no_key(tmp_path)
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert "[key]" in kept
    echo.mode = "refuse"
    (tmp_path / "refused").mkdir()
    error = generate(made, tmp_path / "refused", echo, documents=made / "texts")
    assert "status 401 (bad key [key]); set OPENAI_API_KEY" in error
    assert_no_key(tmp_path / "refused")


def test_servers_that_redirect_or_drip_are_left(made: Path, tmp_path: Path, echo: Any) -> None:
    """C3, C7."""
    echo.mode = "elsewhere"
    error = generate(made, tmp_path, echo, documents=made / "texts")
    assert f"redirects to http://localhost:{echo.server_address[1]}/v1, another server" in error
    echo.mode = "drip"
    began = time.monotonic()
    flags = {"timeout_seconds": 1, "request_seconds": 1, "retries": 1, "restart": True}
    error = generate(made, tmp_path, echo, documents=made / "texts", **flags)
    assert "no answer after 2 tries (the last: no whole answer within 1 s (request_seconds))" in error
    assert time.monotonic() - began < 45


def test_links_that_lead_out_of_the_documents_are_not_sent(made: Path, tmp_path: Path, echo: Any) -> None:
    """B13, B15, B16."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes((made / "texts" / "0.txt").read_bytes())
    (tmp_path / "passwd").write_text("root:x:0:0: the tower " * 30)
    (texts / "b.txt").symlink_to("../passwd")
    (texts / "loop").symlink_to(".")
    os.mkfifo(texts / "c.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(texts / "d.txt"))
    said = generate_refused(made, tmp_path, echo, documents=texts / "**")
    assert "1 symbolic link(s) lead out of the folder and are left out" in said and "--follow-symlinks" in said
    assert "of 1 documents" in said and not any(b"root:x" in body for body in echo.bodies)
    flags = {"follow_symlinks": True, "restart": True}
    said = run_generation(made, tmp_path, echo, documents=texts, expect=0, **flags).stdout
    assert "of 2 documents" in said and any(b"root:x" in body for body in echo.bodies)


def test_a_damaged_stage_is_named_and_made_again(made: Path, tmp_path: Path, echo: Any) -> None:
    generate_refused(made, tmp_path, echo, documents=made / "texts")
    stage = tmp_path / "pairs.jsonl.work" / "part-00-of-01" / "short.jsonl"
    stage.write_text(stage.read_text().replace("answer", "answex", 1))
    error = generate(made, tmp_path, echo, documents=made / "texts")
    assert f"{stage}: line 1 is damaged (its checksum differs); start again with --restart" in error
    generate_refused(made, tmp_path, echo, documents=made / "texts", restart=True)


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def test_damaged_evaluations_are_named(made: Path, tmp_path: Path) -> None:
    """B24 to B26."""
    cell = {"key": "ruler/vt/4096/0", "task": "vt", "length": 4096, "index": 0, "score": 0.5, "digest": "d"}
    suites = {"ruler": {"settings": {}, "asked": {}, "metrics": {}}}
    for name in ("a", "b"):
        (tmp_path / name / "ruler").mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps({"format": 1, "suites": suites}))
        (tmp_path / name / "ruler" / "samples.jsonl").write_text(json.dumps(cell))
    line = command("evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b"), output=tmp_path / "comparison")
    run(line)
    samples, results = tmp_path / "b" / "ruler" / "samples.jsonl", tmp_path / "b" / "results.json"
    samples.write_text(json.dumps({**cell, "score": 7}) + "\n")
    assert "samples.jsonl: line 1: its score 7 is not between 0 and 1" in one_error(run(line, expect=2).stderr)
    samples.write_text("[" * 10**5 + "\n")
    assert "samples.jsonl: line 1: is nested more than 64 levels deep" in one_error(run(line, expect=2).stderr)
    results.write_text("[" * 10**5)
    assert "results.json: is not a result of this version" in one_error(run(line, expect=2).stderr)
