"""Parts of pair generation: units and chunks, filters, stage files, engines, a server's moods."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.config import from_yaml
from megatron_longpo.engines import openai_engine
from megatron_longpo.engines.base import EngineError, Prompt, Rope, Sampling
from megatron_longpo.engines.openai_engine import OpenAIEngine
from megatron_longpo.engines.settings import EngineConfig
from megatron_longpo.engines.transformers_engine import TransformersEngine
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.generation.chunks import group_units, take_units, units_of
from megatron_longpo.generation.filters import LanguageFilter, is_repetitive, questions_in, why_not_ask, why_not_keep
from megatron_longpo.generation.pairs import Cutter
from megatron_longpo.generation.report import Report
from megatron_longpo.generation.settings import (
    AnswersConfig,
    DocumentsConfig,
    FiltersConfig,
    GenerationConfig,
    QuestionsConfig,
    RunConfig,
    check,
)
from megatron_longpo.generation.stages import DocumentLines, Line, Stage, part_folder, read_lines
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.share import Share, share_of_process
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES
from megatron_longpo.text.documents import DOMAINS, RawDocument, find_files
from tests.support.launch import ROOT
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer

# --------------------------------------------------------------------------------------------------
# Units and chunks
# --------------------------------------------------------------------------------------------------


def letters(texts: Any) -> list[int]:
    """Tokens for these tests: one for every letter."""
    return [len(t) for t in texts]


@given(
    st.text(st.sampled_from("ab .\n\\{}#d'é。"), max_size=400),
    st.sampled_from(DOMAINS),
    st.integers(1, 40),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_chunks_are_stretches_of_the_text_of_the_asked_size(text: str, domain: Any, smallest: int, more: int) -> None:
    units = units_of(text, domain, letters, more)
    # With the white space after it.
    nexts = [*(u.start for u in units[1:]), len(text)][: len(units)]
    assert all(u.tokens <= more and u.tokens == n - u.start for u, n in zip(units, nexts, strict=True))
    ends = [0]
    for unit in units:
        # Nothing is lost but white space, nothing is there twice.
        assert unit.start >= ends[-1] and text[ends[-1] : unit.start].strip() == ""
        ends.append(unit.end)
    assert text[ends[-1] :].strip() == ""
    chunks = group_units(units, smallest, smallest + more)
    assert all(smallest <= c.tokens <= smallest + more and c.end - c.start <= c.tokens for c in chunks)
    assert all(a.end <= b.start for a, b in itertools.pairwise(chunks))
    if sum(u.tokens for u in units) >= 2 * (smallest + more):
        assert chunks, "a long enough text has a chunk"


def test_domains_are_cut_at_their_joints() -> None:
    def pieces(text: str, domain: Any, largest: int = 10**6) -> list[str]:
        return [text[u.start : u.end] for u in units_of(text, domain, letters, largest)]

    paper = "Preamble.\n\\section{One}\nFirst.\n\n\\subsection{A}\nMore.\n\\section{Two}\nLast."
    assert pieces(paper, "arxiv") == [
        "Preamble.",
        "\\section{One}\nFirst.\n\n\\subsection{A}\nMore.",
        "\\section{Two}\nLast.",
    ]
    assert pieces(paper, "arxiv", 25)[1:3] == ["\\section{One}\nFirst.", "\\subsection{A}\nMore."]
    code = "import os\n\ndef one():\n    return 1\n\n@wrap\ndef two():\n    return 2\nclass Three:\n    def four(self): ...\n"
    assert pieces(code, "code", 40) == [
        "import os",
        "def one():\n    return 1",
        "@wrap",
        "def two():\n    return 2",
        "class Three:\n    def four(self): ...",
    ]
    assert pieces("// File: a.c\nint x;\n// File: b.c\nint y;", "code") == [
        "// File: a.c\nint x;",
        "// File: b.c\nint y;",
    ]
    assert pieces("One.\n \n\nTwo. Three.", "book") == ["One.", "Two. Three."]
    assert pieces("One.Two. 三。四。", "book", 6) == ["One.", "Two.", "三。", "四。"]
    assert pieces("abcdefgh", "other", 4) == list("abcdefgh")


def test_runs_of_units() -> None:
    units = units_of("aa bb cc dd", "other", letters, 3)
    assert take_units(units, 6) == (units[0].__class__(0, 5, 6), 2)
    assert take_units(units, 1, 3)[1] == 4


def test_a_document_of_two_million_tokens_is_cut(tmp_path: Path) -> None:
    make_fast_tokenizer(tmp_path)
    paragraph = "The tower was built in 1889 and it stands on the left bank of the river."
    text = "\n\n".join(f"{paragraph} {i}" for i in range(90_000))
    config = _config(tmp_path, seq_length=131072, overlong="split", chunks_per_document=4)
    began = time.monotonic()
    lines = Cutter(config).lines(0, RawDocument(0, "long", "book", text))
    assert sum(line["tokens"] for line in lines) > 1_900_000 and time.monotonic() - began < 120
    assert len(lines) > 14 and [line["part"] for line in lines] == list(range(len(lines)))
    for line in lines:
        assert line["text"] in text and len(line["chunks"]) == (4 if line is not lines[-1] else 3)
        assert all(16384 <= tokens <= 30000 for _, _, tokens in line["chunks"])


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(
    "piece", ["x", "word ", "f(x) g(y)\n", "\n", "int f(\n", "... ", "\\section", ".'\"'", "# File: a\n"]
)
def test_no_text_takes_long_to_cut(domain: Any, piece: str) -> None:
    text = piece * (2 * 10**5 // len(piece))
    began = time.monotonic()
    units = units_of(text, domain, letters, 5000)
    group_units(units, 1000, 6000)
    assert time.monotonic() - began < 10


def _config(model: Path, **documents: Any) -> GenerationConfig:
    return GenerationConfig(
        documents=DocumentsConfig(documents=("x",), **documents),
        engine=EngineConfig(model=str(model)),
        run=RunConfig(output="out.jsonl"),
    )


def test_lengths_are_those_of_the_texts(tmp_path: Path) -> None:
    """White space counts: documents and chunks, counted whole, keep their limits."""
    make_fast_tokenizer(tmp_path)
    config = _config(tmp_path, seq_length=6000, overlong="cut", chunks_per_document=1, min_document_tokens=100)
    config = dataclasses.replace(config, answers=AnswersConfig(answer_tokens=100))
    cutter = Cutter(config)
    smallest, largest = config.chunk_tokens
    for name, text in {
        "dialogue": "\n\n".join(f"Yes {i}." for i in range(3000)),
        "code": "\n".join("    " * (i % 9) + f"call({i})" for i in range(3000)),
        "blank lines": ("word" + "\n" * 60) * 300,
    }.items():
        (line,) = cutter.lines(0, RawDocument(0, name, "other", text))
        assert cutter.tokenizer.count([line["text"]])[0] <= config.document_tokens[1], name
        for start, end, tokens in line["chunks"]:
            real = cutter.tokenizer.count([line["text"][start:end]])[0]
            assert real <= tokens <= largest and tokens >= smallest, name


def test_files_and_domains(tmp_path: Path) -> None:
    for name in ("books/a.txt", "code/b.py", "c.tex", "d.py", "e.md", ".hidden.txt", "f.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = {str(p.relative_to(tmp_path)): d for p, d in find_files([str(tmp_path)], "auto")}
    assert found == {"books/a.txt": "book", "c.tex": "arxiv", "code/b.py": "code", "e.md": "other"}
    assert {d for _, d in find_files([str(tmp_path)], "code")} == {"code"}
    assert [p.name for p, _ in find_files([str(tmp_path / "**" / "*.txt")], "auto")] == ["a.txt"]
    for wrong, message in (
        ("none", "no such file"),
        ("f.bin", "is of an unknown kind"),
        ("*.zip", "no file matches it"),
    ):
        with pytest.raises(DataError, match=message):
            find_files([str(tmp_path / wrong)], "auto")


def test_lengths_follow_the_target() -> None:
    paper = GenerationConfig()
    assert paper.chunk_tokens == (16384, 30000) and paper.document_tokens[0] == 65536
    short = _config(Path("m"), seq_length=8192)
    assert short.chunk_tokens == (1024, 1875)
    assert GenerationConfig(documents=DocumentsConfig(seq_length=524288)).chunk_tokens == (16384, 30000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerationConfig(), "documents is not given"),
        (_config(Path("m"), seq_length=2000), "raise seq_length, or lower answer_tokens"),
        (_config(Path("m"), min_chunk_tokens=40000), "above max_chunk_tokens=30000"),
        (_config(Path("m"), min_chunk_tokens=29000), "is too near max_chunk_tokens=30000"),
        (_config(Path("m"), chunks_per_document=0), "chunks_per_document=0 must be at least 1"),
    ],
)
def test_configurations_that_cannot_work_are_refused(config: GenerationConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"questions": QuestionsConfig(question_pattern="(")}, "not a regular expression"),
        ({"questions": QuestionsConfig(question_pattern="x")}, "has no group"),
        ({"questions": QuestionsConfig(question_prompt="{chunk}")}, "cannot be filled in"),
        ({"questions": QuestionsConfig(question_prompt="{count.x}")}, "cannot be filled in"),
        ({"answers": AnswersConfig(answer_temperature=float("nan"))}, "answer_temperature=nan"),
        ({"engine": EngineConfig(model="m", retries=-1)}, "retries=-1"),
        ({"engine": EngineConfig(model="m", base_url="host/v1")}, "must begin with http"),
        ({"questions": QuestionsConfig(lead_ins=())}, "lead_ins is empty"),
        ({"answers": AnswersConfig(answer_top_p=0.0)}, "answer_top_p=0.0"),
        ({"engine": EngineConfig(engine="openai", model="m")}, "needs tokenizer"),
        ({"engine": EngineConfig(model="m", base_url="http://me:secret@host/v1")}, "has a user name or a key"),
        ({"run": RunConfig(output="o", rank=2, world_size=2)}, "from 0 to world_size - 1 = 1"),
        ({"run": RunConfig(output="o", rank=2)}, "belong together"),
    ],
)
def test_sections_that_cannot_work_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(_config(Path("m")), **section))


# --------------------------------------------------------------------------------------------------
# Filters
# --------------------------------------------------------------------------------------------------


def test_numbered_questions_are_found() -> None:
    pattern = QuestionsConfig().question_pattern
    reply = 'Here they are:\n1. What is it?\n2) "Why?"\n **3. How so?**\n4: Where?\nThanks for 5 things.\n'
    assert questions_in(reply, pattern) == ["What is it?", "Why?", "How so?", "Where?"]
    assert questions_in("No numbers? None at all.", pattern) == []
    assert questions_in("1.\n2. What is it?", pattern) == ["What is it?"]
    began = time.monotonic()
    assert len(questions_in("1. What is" + " " * 20000 + "it?" + "\n" * 20000, pattern)) == 1
    assert time.monotonic() - began < 2


def test_reasons_not_to_keep() -> None:
    c = FiltersConfig()
    told = QuestionsConfig().question_prompt
    assert why_not_ask("What did the fox see in the garden?", told, c) is None
    assert why_not_ask("Why?", told, c) == "question_length"
    assert (
        why_not_ask("Write questions that can be answered from the text above", told, c)
        == "question_quotes_instruction"
    )
    good, other = "The fox saw three hens.", "The text is about a fox."
    assert why_not_keep(good, other, c) is None
    assert why_not_keep(" ", other, c) == "empty_chosen" and why_not_keep(good, "", c) == "empty_rejected"
    assert why_not_keep(good, good + "\n", c) == "identical_answers"
    assert why_not_keep("I’m sorry, but I cannot say.", other, c) == "refusal_chosen"
    assert why_not_keep(good, "As an AI, I have no fox.", c) is None
    assert why_not_keep(good, "As an AI, I have no fox.", FiltersConfig(refuse_rejected_too=True)) == "refusal_rejected"
    assert why_not_keep("the hen ran off and " * 30, other, c) == "repetitive_chosen"
    assert is_repetitive("ab" * 400, c) and not is_repetitive(" ".join(f"w{i}" for i in range(300)), c)
    late = "x " * 150 + "I cannot"
    assert why_not_keep(late, other, FiltersConfig(max_compression=1e9, max_repeated_ngrams=1.0)) is None


def test_languages() -> None:
    german = "Der Fuchs sah drei Hühner im Garten, und niemand war da, der sie bewachte."
    english = "The fox saw three hens in the garden, and nobody was there to guard them."
    assert LanguageFilter([], 0.5).passes(german)
    only = LanguageFilter(["en"], 0.5)
    assert only.passes(english, "Yes.") and not only.passes(english, german)
    with pytest.raises(ConfigError, match="languages=qq is not a known code"):
        LanguageFilter(["qq"], 0.5)


# --------------------------------------------------------------------------------------------------
# Stage files
# --------------------------------------------------------------------------------------------------


def test_a_stage_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "short", {"a": 1})
    with stage:
        stage.append([{"n": 0}, {"n": 1, "t": "ä\u2028"}])
    with open(stage.path, "ab") as stream:
        stream.write(b'{"n": 2, "t": "ha')
    again = Stage(tmp_path, "short", {"a": 1})
    assert again.records == 2 and not again.finished
    with again:
        again.append([{"n": 2}])
    again.finish()
    assert [line["n"] for line in read_lines(stage.path)] == [0, 1, 2]
    assert [line["n"] for line in read_lines(stage.path, skip=2)] == [2]
    assert Stage(tmp_path, "short", {"a": 1}).finished
    with pytest.raises(DataError, match="made with a=1, now it is 2"):
        Stage(tmp_path, "short", {"a": 2})
    stage.manifest_path.write_text("{")
    with pytest.raises(DataError, match="start again with --restart"):
        Stage(tmp_path, "short", {"a": 1})


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

HOSTILE = """<script>alert("1")</script> & 'quoted' <img src=x onerror=alert(1)> </pre></details> {{ 7 * 7 }} \ud800"""


class _Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def _report_page(text: str) -> str:
    """Page of a run whose every piece of foreign text is ``text``."""
    report = Report(num_samples=5, seed=0)
    context = f"{text}\n\n{text} chunk {text}\n\n{text}"
    document: Line = {
        "number": 0,
        "part": 0,
        "id": "id",
        "name": text,
        "domain": "book",
        "tokens": 1234,
        "text": context,
        "chunks": [[0, len(text), 12]],
    }
    spent = {"prompt_tokens": 10, "new_tokens": 4, "seconds": 2.0}
    answered = {**spent, "turns": [{"text": text, "prompt_tokens": 5, "new_tokens": 2}]}
    lines = DocumentLines(document, {**spent, "turns": [{"question": text}]}, answered, answered)
    turn = {"instruction": text, "short_context": text, "chosen": text, "rejected": text}
    report.add(lines, {"id": text, "context": context, "turns": [turn]}, [{"reason": text}])
    return report.as_html(f"output: {text}")


def test_a_report_shows_hostile_text_and_runs_none_of_it() -> None:
    harmless, page = _report_page("plain"), _report_page(HOSTILE)
    found, expected = _Page(page), _Page(harmless)
    assert found.tags == expected.tags and found.attributes == expected.attributes, "text adds no element"
    assert "script" not in found.tags and "onerror" not in found.attributes
    # Reason, document, instruction, both answers, chunk and configuration in full; beginnings in the outline.
    assert found.text.count(HOSTILE) == 7
    assert found.text.count(HOSTILE[:80]) == 10
    assert "1,234 tokens, 1 turn(s)" in found.text and "{{ 7 * 7 }}" in page and "49" not in found.text
    assert page.count("<mark>") == 1 and "left:0.00%" in page


# --------------------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_fast_tokenizer(folder)
    return make_chat_model(folder, 0.2)


def _prompts(document: str, *questions: str) -> list[Prompt]:
    return [Prompt(({"role": "user", "content": f"{document}\n\n{q}"},), seed=i) for i, q in enumerate(questions)]


def test_a_shared_document_changes_no_answer(chat_model: Path) -> None:
    """Together, one by one from scratch, in other pieces and batches: greedy and sampled tokens are those of transformers'
    own generate and of one another."""
    import torch

    document = "The tower stands by the river. " * 20
    prompts = _prompts(document, "Where?", "When was it built, and by whom?", "Why?", "What for, then?", "How?")
    engine = TransformersEngine(chat_model, dtype="float32", batch_size=2, prefill_tokens=50)
    whole = TransformersEngine(chat_model, dtype="float32", batch_size=8)
    for sampling in (Sampling(20), Sampling(20, temperature=0.8, top_p=0.9)):
        (together,) = engine.answer([prompts], sampling)
        alone = [whole.answer([[p]], sampling)[0][0] for p in prompts]
        assert [r.text for r in together] == [r.text for r in alone]
        assert [r.new_tokens for r in together] == [r.new_tokens for r in alone]
        assert whole.answer([prompts], sampling) == [together]
    (greedy,) = engine.answer([prompts], Sampling(20))
    assert whole.tokenizer.answer_ends() == {1}, "<|im_end|>"
    ends = [1]
    for prompt, reply in zip(prompts, greedy, strict=True):
        ids = torch.tensor([whole.tokenizer.prompt(list(prompt.messages))])
        made = whole.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=ends,
        )
        assert whole.tokenizer.decode(made[0, ids.shape[1] :].tolist()).strip() == reply.text
        assert reply.prompt_tokens == ids.shape[1]


def test_models_are_loaded_on_the_platforms_device(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU when the platform is the CPU (``MEGATRON_LONGPO_PLATFORM=cpu``)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TransformersEngine(chat_model).model.device == platform.CURRENT.device
    monkeypatch.setattr(type(platform.CURRENT), "device", torch.device("meta"))
    assert TransformersEngine(chat_model).model.device == torch.device("meta")


def test_rope_is_changed_for_a_while(chat_model: Path) -> None:
    engine = TransformersEngine(chat_model, dtype="float32")
    prompts = [_prompts("The tower. " * 60, "Where?", "Why?")]
    plain = engine.answer(prompts, Sampling(24))
    scaled = Rope(1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert engine.answer(prompts, Sampling(24), scaled) != plain
    frequencies = engine.model.model.rotary_emb.inv_freq
    assert engine.model.model.rotary_emb.attention_scaling > 1 and float(frequencies[-1]) < 1e-4
    assert engine.answer(prompts, Sampling(24)) == plain


Script = Callable[[int, dict[str, Any]], tuple[int, bytes, dict[str, str]]]


@pytest.fixture
def scripted(chat_model: Path) -> Iterator[Callable[..., tuple[OpenAIEngine, list[float]]]]:
    """A server whose answer to each request a function decides, and an engine for it."""
    servers: list[ThreadingHTTPServer] = []

    def make(script: Script, **settings: Any) -> tuple[OpenAIEngine, list[float]]:
        times: list[float] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(times)
                    times.append(time.monotonic())
                status, content, headers = script(number, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        config = EngineConfig(engine="openai", model="m", tokenizer=str(chat_model), base_url=url, **settings)
        return OpenAIEngine(config), times

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def _completion(text: str, reason: str = "stop") -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}).encode()


def test_the_servers_wish_to_wait_is_honoured(scripted: Any) -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        return (429, b"{}", {"Retry-After": "1.5"}) if number == 0 else (200, _completion("yes"), {})

    engine, times = scripted(script, concurrency=1)
    (replies,) = engine.answer([_prompts("d", "one", "two")], Sampling(5))
    assert [r.text for r in replies] == ["yes", "yes"] and replies[0].prompt_tokens == 7
    assert times[1] - times[0] >= 1.5 and engine.retried == 1


def test_what_passes_is_tried_again_and_what_does_not_is_not(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine.random, "uniform", lambda a, b: 0.0)
    half = _completion("whole")[:30]
    moods = [(500, b"", {}), (200, half, {}), (200, half, {"Content-Length": "900"}), (503, b"", {}), (200, b"[]", {})]

    def script(number: int, body: dict[str, Any]) -> Any:
        assert body["temperature"] == 0.0 and body["max_tokens"] == 5
        return moods[number] if number < len(moods) else (200, _completion("whole", "length"), {})

    engine, _ = scripted(script, retries=6)
    ((reply,),) = engine.answer([_prompts("d", "one")], Sampling(5))
    assert reply.text == "whole" and not reply.finished and engine.retried == 5
    engine, times = scripted(lambda n, b: (400, b'{"error": "context length exceeded"}', {}))
    ((reply,),) = engine.answer([_prompts("d", "one")], Sampling(5))
    assert reply.refused is not None and "context length" in reply.refused and len(times) == 1
    engine, times = scripted(lambda n, b: (400, b'{"error": "seed is not supported"}', {}))
    with pytest.raises(EngineError, match="seed is not supported"):
        engine.answer([_prompts("d", "one")], Sampling(5))
    engine, times = scripted(lambda n, b: (401, b"no", {}))
    with pytest.raises(EngineError, match="set OPENAI_API_KEY"):
        engine.answer([_prompts("d", "one")], Sampling(5))
    assert len(times) == 1
    engine, times = scripted(lambda n, b: (500, b"", {}), retries=2)
    with pytest.raises(EngineError, match=r"no answer after 3 tries \(the last: status 500\)"):
        engine.answer([_prompts("d", "one")], Sampling(5))


def _message(content: Any, reason: str = "stop", usage: Any = None, **more: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": usage or {"prompt_tokens": 7, "completion_tokens": 9}}).encode()


HIDDEN = {"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 8}}


@pytest.mark.parametrize(
    ("body", "text", "no_answer", "thought"),
    [
        (_message("Paris."), "Paris.", None, False),
        (_message(None), "", "empty", False),
        (_message(""), "", "empty", False),
        (_message(None, tool_calls=[{"id": "1"}]), "", "empty", False),
        (_message("<think>a</think>Paris."), "Paris.", None, True),
        (_message("a</think>Paris."), "Paris.", None, True),
        (_message("<think>a", "length"), "", "only_thinking", True),
        # Servers that part thinking themselves: vLLM, SGLang and others; and those that only count it.
        (_message("Paris.", reasoning_content="Hm."), "Paris.", None, True),
        (_message(None, "length", reasoning_content="Hm."), "", "only_thinking", True),
        (_message(None, "length", reasoning="Hm."), "", "only_thinking", True),
        (_message("", "length", usage=HIDDEN), "", "only_thinking", True),
        (_message("Par", "content_filter"), "Par", "declined", False),
        (_message(None, refusal="I will not."), "", "declined", False),
    ],
)
def test_what_is_no_answer_is_told_apart(
    scripted: Any, body: bytes, text: str, no_answer: str | None, thought: bool
) -> None:
    engine, _ = scripted(lambda n, b: (200, body, {}))
    ((reply,),) = engine.answer([_prompts("d", "one")], Sampling(5))
    assert (reply.text, reply.no_answer, reply.thinking_tokens > 0) == (text, no_answer, thought)


def test_a_server_gets_the_template_s_arguments_and_tokens_for_thinking(scripted: Any, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    def script(number: int, body: dict[str, Any]) -> Any:
        bodies.append(body)
        return 200, _completion("yes"), {}

    template = tmp_path / "template"
    template.write_text(BUILT_IN_TEMPLATES["chatml"] + "{% if enable_thinking %}{% endif %}")
    more = {"chat_template": str(template), "chat_template_kwargs": '{"enable_thinking": false}', "thinking_tokens": 90}
    for settings_ in ({}, more):
        engine, _ = scripted(script, **settings_)
        engine.answer([_prompts("d", "one")], Sampling(5))
    assert "chat_template_kwargs" not in bodies[0] and bodies[0]["max_tokens"] == 5
    assert bodies[1]["chat_template_kwargs"] == {"enable_thinking": False} and bodies[1]["max_tokens"] == 95
    assert engine.identity["thinking"]["tokens"] == 90


def test_a_server_may_keep_thinking_to_itself(scripted: Any, tmp_path: Path) -> None:
    """Where the template opens thinking: what is finished is an answer, what is cut without a mark is thinking."""
    (tmp_path / "t").write_text(BUILT_IN_TEMPLATES["chatml"].removesuffix("{% endif %}") + "<think>\n{% endif %}")
    bodies = [_message("Paris."), _message("It may be", "length"), _message("Par", "length", reasoning_content="Hm.")]
    engine, _ = scripted(lambda n, b: (200, bodies[n], {}), chat_template=str(tmp_path / "t"), concurrency=1)
    (replies,) = engine.answer([_prompts("d", "one", "two", "three")], Sampling(5))
    assert [reply.text for reply in replies] == ["Paris.", "", "Par"]
    assert [reply.no_answer for reply in replies] == [None, "only_thinking", None]


def test_a_slurm_array_is_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert share_of_process(None, None, slurm_array=True) == Share()
    for key, value in {"ID": "14", "MIN": "10", "MAX": "16", "COUNT": "4", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    assert share_of_process(None, None, slurm_array=True) == Share(2, 4, "a Slurm array")
    assert share_of_process(None, None) == Share()


def test_examples_are_configurations_that_work() -> None:
    for name in ("pairs_128k.yaml", "demo_pairs.yaml"):
        config = from_yaml(ROOT / "examples" / name, GenerationConfig)
        documents = dataclasses.replace(config.documents, documents=("x",))
        engine = dataclasses.replace(config.engine, model="m")
        check(dataclasses.replace(config, documents=documents, engine=engine, run=RunConfig(output="o")))


def test_replies_do_not_depend_on_what_is_kept(tmp_path: Path) -> None:
    """A mix of calls on an engine that keeps prefixes: the tokens of one that reads every prompt whole and alone."""
    make_fast_tokenizer(tmp_path)
    make_chat_model(tmp_path)
    rng = random.Random(2)
    words = ["tower", "river", "bank", "people", "climb", "view", "left", "built"]
    text = " ".join(rng.choices(words, k=300))

    def prompt(message: str) -> Prompt:
        return Prompt(({"role": "user", "content": message},), prefix=" It")

    calls = [
        # Singles that share much, less, and all of what was read; short ones of unequal length beside long ones.
        [[prompt(text)], [prompt(text[:900] + " other " + text[:300])], [prompt(text[:500])], [prompt("tower")]],
        # A group on one text, more than a batch of it, then a single that goes on from the text.
        [[prompt(f"{text} {word}?") for word in words[:5]]],
        [[prompt(text + " and more")]],
        [[prompt("tower")], [prompt("tower river bank people climb")]],
        [[prompt(text)]],
    ]
    keeping = TransformersEngine(tmp_path, dtype="float32", batch_size=3, keep_prefix=True)
    plain = TransformersEngine(tmp_path, dtype="float32", batch_size=1)
    for call in calls:
        found = keeping.answer(call, Sampling(12))
        for group, replies in zip(call, found, strict=True):
            for one, reply in zip(group, replies, strict=True):
                ((alone,),) = plain.answer([[one]], Sampling(12))
                assert reply == alone and reply.new_tokens


def test_a_model_of_another_build_answers_too(tmp_path: Path) -> None:
    """GPT-2 has learned positions, and its layers under another name: no packing, no kept prefix, the same words."""
    import transformers

    make_fast_tokenizer(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=402, n_embd=48, n_layer=2, n_head=4, n_positions=1024, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path)
    rng = random.Random(2)
    text = " ".join(rng.choices(["tower", "river", "bank", "people", "climb", "view"], k=100))
    prompts = [Prompt(({"role": "user", "content": f"{text} {word}"},)) for word in ("tower", "river bank", "people")]
    engine = TransformersEngine(tmp_path, dtype="float32", batch_size=2, keep_prefix=True)
    (together,) = engine.answer([prompts], Sampling(8))
    for prompt, reply in zip(prompts, together, strict=True):
        ids = torch.tensor([engine.tokenizer.prompt(list(prompt.messages), prompt.prefix)])
        written = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=1
        )
        kept = [t for t in written[0, ids.shape[1] :].tolist() if t != 1]
        assert reply.text == engine.tokenizer.decode(kept).strip() and reply.new_tokens


@pytest.mark.parametrize("time_of_file", [0, 2**32])
def test_a_restart_waits_for_all_parts_to_begin_afresh_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_of_file: int
) -> None:
    """Two processes of a launch; the parts are there, finished by an earlier one long ago, or in the future."""
    from megatron_longpo.generation import run
    from tests.support.launch import free_port

    monkeypatch.setattr(run, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    output = tmp_path / "pairs.jsonl"
    for rank in range(2):
        folder = part_folder(output, rank, 2)
        folder.mkdir(parents=True)
        Stage(folder, "long", {}).finish()
        os.utime(folder / "long.manifest.json", (time_of_file, time_of_file))
    run._wait_for_parts(output, 2, None)
    first = run.Restarted(Share(0, 2, "torchrun"))
    other = run.Restarted(Share(1, 2, "torchrun"))
    first.add()
    waiting = threading.Thread(target=run._wait_for_parts, args=(output, 2, first), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not first.all_have
    other.add()
    waiting.join(10)
    assert not waiting.is_alive() and first.all_have
