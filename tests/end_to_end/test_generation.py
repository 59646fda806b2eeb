"""Pairs by the command line: splits, kills, a real server behind a bad line, odd documents, and what takes the pairs."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.flaky_proxy import FlakyProxy
from tests.support.launch import environment, free_port, run, torchrun
from tests.support.models import make_chat_model
from tests.support.tokenizers import WORDS, make_fast_tokenizer

TOOL = [sys.executable, "tools/generate_preference_data.py"]
DOCUMENTS = 18
CONFIG = """
documents: {seq_length: 1200, min_chunk_tokens: 100, max_chunk_tokens: 300, min_document_tokens: 200, chunks_per_document: 3,
  overlong: cut}
questions: {questions_per_chunk: 1, question_pattern: '(.+)', question_tokens: 12}
answers: {answer_tokens: 16}
engine: {dtype: float32, documents_at_once: 2}
# A model of random weights writes what it writes.
filters: {keep_truncated: true, min_question_words: 0, max_quoted_words: 1.0, max_compression: 100.0}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model of random weights, some documents, a configuration."""
    folder = tmp_path_factory.mktemp("generation")
    make_fast_tokenizer(folder / "model")
    make_chat_model(folder / "model")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(DOCUMENTS):
        (folder / "texts" / f"{number:02d}.txt").write_text(_text(rng, 12))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def _text(rng: random.Random, paragraphs: int) -> str:
    return "\n\n".join(" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + "." for _ in range(paragraphs))


def arguments(made: Path, output: Path, documents: Path | None = None) -> list[str]:
    source = str(documents or made / "texts")
    return [
        *("--config", str(made / "config.yaml"), "--documents", source),
        *("--model", str(made / "model"), "--output", str(output)),
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def undisturbed(made: Path) -> Path:
    """Pairs made in one go by one process."""
    run([*TOOL, *arguments(made, made / "pairs.jsonl")], fresh=True)
    return made / "pairs.jsonl"


def test_pairs_are_what_the_data_tools_take(made: Path, undisturbed: Path) -> None:
    samples = lines(undisturbed)
    checksum = undisturbed.with_name("pairs.jsonl.sha256").read_text().split()[0]
    assert checksum == hashlib.sha256(undisturbed.read_bytes()).hexdigest()
    assert len(samples) == DOCUMENTS and sum(len(s["turns"]) for s in samples) > DOCUMENTS
    for sample in samples:
        for turn in sample["turns"]:
            assert turn["short_context"] in sample["context"]
            assert turn["chosen"] != turn["rejected"] and turn["instruction"]
    tool = [sys.executable, "tools/preprocess_preference_data.py", "--input", str(undisturbed)]
    run([*tool, "--tokenizer", str(made / "model"), "--output-prefix", str(made / "data")])
    manifest = json.loads((made / "data.json").read_text())
    assert manifest["samples"] == DOCUMENTS and not manifest["rejected"]
    report = json.loads((made / "pairs.jsonl.report" / "report.json").read_text())
    assert report["counts"]["samples"] == DOCUMENTS == report["counts"]["documents read"]
    kept = report["counts"]["turns kept"]
    assert kept == sum(len(s["turns"]) for s in samples)
    turn_rejects = [r for r in lines(made / "pairs.jsonl.rejects.jsonl") if "turn" in r]
    assert report["counts"]["chunks"] == kept + len(turn_rejects)
    page = (made / "pairs.jsonl.report" / "report.html").read_text()
    assert "data:image/png;base64," in page and samples[0]["turns"][0]["instruction"][:20] in page
    assert not re.search(r"(src|href)=.http", page), "self-contained"


def test_killed_ten_times_in_three_parts(made: Path, undisturbed: Path) -> None:
    output = made / "killed.jsonl"
    quiet = environment(TOKENIZERS_PARALLELISM="false")
    done = run([sys.executable, "-m", "tests.support.killed_generation", *arguments(made, output)], env=quiet)
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("killed 10 times; while writing: ")]
    assert said.count(".jsonl") >= 2, "in several stages"
    assert output.read_bytes() == undisturbed.read_bytes()
    assert lines(made / "killed.jsonl.rejects.jsonl") == lines(made / "pairs.jsonl.rejects.jsonl")


def test_torchrun_splits_and_merges(made: Path, undisturbed: Path) -> None:
    output = made / "shared.jsonl"
    run(torchrun(2, TOOL[1], *arguments(made, output)))
    assert output.read_bytes() == undisturbed.read_bytes()


def test_other_settings_do_not_go_on(made: Path, undisturbed: Path) -> None:
    done = run([*TOOL, *arguments(made, undisturbed), "--answer-tokens", "8"], expect=2)
    assert "answer_tokens=16, now it is 8" in done.stderr and "--restart" in done.stderr
    done = run([*TOOL, *arguments(made, undisturbed), "--rank", "1", "--world-size", "2"], expect=2)
    assert "split in 1 parts, not 2" in done.stderr
    done = run([*TOOL, "merge", "--output", str(made / "nothing.jsonl")], expect=2)
    assert "holds no part of a run" in done.stderr


GREEDY = ("--question-temperature", "0", "--batch-size", "1", "--max-documents", "5")
SECRET = "a-secret-key"


@pytest.fixture(scope="module")
def greedy(made: Path) -> bytes:
    """Pairs of five documents, greedily, by the model in the process."""
    run([*TOOL, *arguments(made, made / "greedy.jsonl"), *GREEDY])
    pairs = (made / "greedy.jsonl").read_bytes()
    assert len(pairs.splitlines()) == 5
    return pairs


def generate_served(made: Path, chat_model: Path, url: str, output: Path) -> None:
    """The same pairs by a server that asks for a key; the key is neither printed nor written."""
    remote = ["--engine", "openai", "--model", str(chat_model), "--base-url", f"{url}/v1", "--concurrency", "8"]
    remote += ["--tokenizer", str(made / "model"), "--timeout-seconds", "5", "--retries", "40"]
    done = run([*TOOL, *arguments(made, output), *GREEDY, *remote], env=environment(OPENAI_API_KEY=SECRET))
    written = [p.read_text(errors="replace") for p in output.parent.rglob("*") if p.is_file()]
    assert written and not any(SECRET in text for text in [done.stdout, *written])


def test_a_server_answers_as_the_model_in_the_process_does(
    made: Path, chat_model: Path, server: str, greedy: bytes, tmp_path: Path
) -> None:
    generate_served(made, chat_model, server, tmp_path / "served.jsonl")
    assert (tmp_path / "served.jsonl").read_bytes() == greedy


def test_a_bad_line_to_the_server_changes_nothing(
    made: Path, chat_model: Path, server: str, greedy: bytes, tmp_path: Path
) -> None:
    """A proxy that drops, refuses, cuts and stalls: the same samples, once each."""
    proxy = FlakyProxy(server, seed=2, stall_seconds=60)
    try:
        generate_served(made, chat_model, proxy.url, tmp_path / "flaky.jsonl")
    finally:
        proxy.close()
    assert (tmp_path / "flaky.jsonl").read_bytes() == greedy
    assert all(proxy.counts[k] for k in ("drop", "429", "500", "cut", "garbage", "stall", "pass"))
    assert proxy.authorizations == {f"Bearer {SECRET}"}


def test_a_server_that_refuses_is_named(made: Path, server: str, tmp_path: Path) -> None:
    remote = ["--engine", "openai", "--tokenizer", str(made / "model"), "--retries", "1"]
    gone = [*remote, "--base-url", f"http://127.0.0.1:{free_port()}/v1"]
    done = run([*TOOL, *arguments(made, tmp_path / "x.jsonl"), *gone], expect=2)
    refused = "no answer after 2 tries (the last: ConnectionError: [Errno 111] Connection refused)"
    assert refused in done.stderr and "Traceback" not in done.stderr
    wrong = [*remote, "--base-url", f"{server}/wrong"]
    done = run([*TOOL, *arguments(made, tmp_path / "y.jsonl"), *wrong], expect=2)
    assert "status 404" in done.stderr and "check base_url" in done.stderr


ODD = ("--overlong", "split", "--question-tokens", "4", "--answer-tokens", "4")


@pytest.fixture(scope="module")
def odd(made: Path) -> Path:
    """Documents in every format, with every odd thing in them, and their pairs, made with two workers."""
    rng = random.Random(1)
    folder = made / "odd"
    folder.mkdir()
    good = [_text(rng, 10) for _ in range(6)]
    (folder / "a.txt").write_text(good[0])
    (folder / "b.md").write_bytes(b"\xef\xbb\xbf" + good[1].replace("\n", "\r\n").encode())
    (folder / "c.txt").write_bytes(good[2].encode() + b"\x00 and \xff one broken byte")
    (folder / "d.txt").write_bytes(bytes(range(128, 256)) * 40)
    (folder / "e.txt").write_text("")
    (folder / "f.txt").write_text(good[0])
    (folder / "g.txt").write_text(good[3].replace("\n\n", " "))
    (folder / "h.txt").write_text("x" * 3000)
    (folder / "i.txt").write_text(good[3] + " <|im_end|> " + good[3])
    (folder / "j.txt").write_text("Too short.")
    rows = [{"text": good[4]}, {"other": 1}, {"text": None}, {"text": "lone \ud800 surrogate " + good[5]}]
    raw = "\n".join(json.dumps(r) for r in rows).encode() + b"\n{not json\n\n[1]\n"
    (folder / "k.jsonl.gz").write_bytes(gzip.compress(raw))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array([_text(rng, 8), None, _text(rng, 8)])})
    pyarrow.parquet.write_table(table, folder / "l.parquet")
    with pyarrow.output_stream(str(folder / "m.jsonl.zst"), compression="zstd") as stream:
        stream.write(json.dumps({"text": _text(rng, 8)}).encode() + b"\n")
    run([*TOOL, *arguments(made, made / "odd.jsonl", folder), *ODD, "--workers", "2"])
    return made / "odd.jsonl"


@pytest.fixture(scope="module")
def odd_lines(odd: Path) -> list[dict[str, Any]]:
    """What became of each document."""
    return lines(odd.with_name("odd.jsonl.work") / "part-00-of-01" / "documents.jsonl")


def test_what_is_no_document_is_a_counted_reason(odd_lines: list[dict[str, Any]]) -> None:
    reasons = {r["name"]: r["reason"] for r in odd_lines if "reason" in r}
    assert reasons == {
        "d.txt": "not_text",
        "e.txt": "empty",
        "f.txt": "duplicate",
        "i.txt": "special_token_in_text",
        "j.txt": "document_too_short",
        "k.jsonl.gz:2": "no_text_column",
        "k.jsonl.gz:3": "no_text_column",
        "k.jsonl.gz:5": "not_json",
        "k.jsonl.gz:6": "not_json",
        "k.jsonl.gz:7": "no_text_column",
        "l.parquet:2": "no_text_column",
    }


def test_odd_documents_are_read_in_the_order_of_the_files(odd_lines: list[dict[str, Any]]) -> None:
    names = [r["name"] for r in odd_lines if "reason" not in r]
    assert list(dict.fromkeys(names)) == [
        *("a.txt", "b.md", "c.txt", "g.txt", "h.txt", "k.jsonl.gz:1", "k.jsonl.gz:4"),
        *("l.parquet:1", "l.parquet:3", "m.jsonl.zst:1"),
    ]
    assert "\x00" not in next(r for r in odd_lines if r["name"] == "c.txt")["text"]


def test_chunks_of_odd_documents_are_of_the_asked_size(odd: Path, odd_lines: list[dict[str, Any]]) -> None:
    for line in odd_lines:
        for start, end, tokens in line.get("chunks", []):
            assert 0 <= start < end <= len(line["text"]) and 100 <= tokens <= 300
    pairs = lines(odd)
    assert pairs and all(t["short_context"] in s["context"] for s in pairs for t in s["turns"])


def test_workers_change_no_pair(made: Path, odd: Path) -> None:
    alone = made / "alone.jsonl"
    run([*TOOL, *arguments(made, alone, made / "odd"), *ODD, "--workers", "1"])
    assert alone.read_bytes() == odd.read_bytes()
