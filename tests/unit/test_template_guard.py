"""Chat templates that are broken, run forever or fill the memory; dialogues of many turns."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.data.preference import BadRow
from megatron_longpo.errors import DataError
from megatron_longpo.text import chat
from megatron_longpo.text.chat import Turn, encode_sample, load_tokenizer
from megatron_longpo.text.preprocess import RawRow, Settings, process_row
from megatron_longpo.text.template_guard import TemplateLimitError, render_bounded
from tests.support.tokenizers import make_fast_tokenizer, make_sentencepiece

CHATML = chat.BUILT_IN_TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_fast_tokenizer(path)
    return path


def template(tmp_path: Path, text: str) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(text)
    return str(path)


BROKEN = {
    "syntax": ("a\n{% for m in messages %}{{ m", "line 2: TemplateSyntaxError"),
    "unknown tag": ("{% include_all %}", "TemplateSyntaxError: Encountered unknown tag"),
    "attribute": ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
    "function": ("{{ no_such_function(messages) }}", "UndefinedError: 'no_such_function' is undefined"),
    "file": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "refusal": ("{{ raise_exception('never') }}", "TemplateError: never"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_template_is_refused_at_once_with_its_reason(folder: Path, tmp_path: Path, kind: str) -> None:
    text, reason = BROKEN[kind]
    with pytest.raises(DataError, match="does not render a short conversation") as caught:
        load_tokenizer(folder, template(tmp_path, text))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--chat-template {tmp_path}")


def test_a_broken_template_of_the_tokenizer_itself(folder: Path, tmp_path: Path) -> None:
    make_fast_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{% if %}"}))
    with pytest.raises(DataError, match=rf"--tokenizer {tmp_path}: its chat template: does not render .*SyntaxError"):
        load_tokenizer(tmp_path)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% for a in range(99) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(90) }}",
    "filters": "{% for a in range(99999) %}{% set x = range(99999) | list | sort | join | length %}{% endfor %}",
}
LARGE = {
    "product": "{{ 'x' * 10000000000 }}",
    "doubling": "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joining": "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "width": "{{ 'x' | center(10000000000) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "list": "{{ [1] * 10000000000 }}",
}


@pytest.mark.parametrize("kind", [*ENDLESS, *LARGE])
@pytest.mark.parametrize("form", ["fast", "sentencepiece"])
def test_a_template_has_limits_of_time_and_memory(folder: Path, tmp_path: Path, kind: str, form: str) -> None:
    path = folder if form == "fast" else make_sentencepiece(tmp_path)
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with pytest.raises(DataError, match=r"takes more than (0.5 s|2 GiB)|OverflowError|memory") as caught:
        load_tokenizer(path, template(tmp_path, {**ENDLESS, **LARGE}[kind]), template_seconds=0.5)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20


def test_the_limit_of_memory_is_a_setting(folder: Path, tmp_path: Path) -> None:
    half = template(tmp_path, f"{{% set x = 'x' * {2**27} %}}{CHATML}")
    with pytest.raises(
        DataError, match=r"takes more than 0.0625 GiB of memory; correct it, or raise template_memory_bytes"
    ):
        load_tokenizer(folder, half, template_seconds=60, template_memory_bytes=2**26)
    assert load_tokenizer(folder, half, template_seconds=60)


def test_powers_are_refused_unrun(folder: Path, tmp_path: Path) -> None:
    for text in ("{{ 9 ** 9 ** 9 ** 9 }}", "{% if 2**messages|length %}{% endif %}"):
        with pytest.raises(DataError, match=r"computes powers \(\*\*\)"):
            load_tokenizer(folder, template(tmp_path, text))
    text = "{% macro f(a) %}{% endmacro %}{{ f(**{'a': 1}) }}{{ '2 ** 3' }}" + CHATML
    assert load_tokenizer(folder, template(tmp_path, text))


def test_a_template_that_turns_on_a_row_ends_the_run(folder: Path, tmp_path: Path) -> None:
    text = "{% for m in messages if 'BOMB' in m.content %}" + ENDLESS["loops"] + "{% endfor %}" + CHATML
    tokenizer = load_tokenizer(folder, template(tmp_path, text), template_seconds=0.3)
    turn = {"instruction": "Why?", "short_context": "BOMB", "chosen": "yes", "rejected": "no"}
    row = RawRow(line=1, text=json.dumps({"context": "a BOMB", "turns": [turn]}))
    with pytest.raises(TemplateLimitError, match=r"takes more than 0.3 s; correct it, or raise template_seconds"):
        process_row(row, Settings(tokenizer=str(folder)), tokenizer)


def test_a_limit_that_passed_is_not_felt_later() -> None:
    assert render_bounded(lambda: "text", 0.05) == "text"
    time.sleep(0.1)
    assert sum(range(10**5)) > 0
    # Also when the time is up in the moment that the text is there.
    for _ in range(30):
        with contextlib.suppress(TemplateLimitError):
            assert render_bounded(lambda: time.sleep(0.02) or "text", 0.02) == "text"  # type: ignore[func-returns-value]
        sum(range(10**4))


def test_threads_render_one_after_another() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    found: list[Any] = []

    def render(number: int) -> None:
        try:
            found.append(render_bounded(lambda: str(number) if number % 2 else endless(), 0.2))
        except TemplateLimitError:
            found.append(None)

    def endless() -> str:
        while True:
            pass

    threads = [threading.Thread(target=render, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == ["1", "3", "5", "None", "None", "None"]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


# --------------------------------------------------------------------------------------------------
# Many turns
# --------------------------------------------------------------------------------------------------

CONTEXT = "The tower stands by the river. " * 20
TEMPLATES = {
    "chatml": CHATML,
    "with the number of the turn": CHATML.replace("message['content']", "(loop.index | string) + message['content']"),
    "with a word to the last": CHATML.replace("message['content']", "message['content'] + ('!' if loop.last else '')"),
    "other once": CHATML.replace("message['content']", "message['content'] + ('!' if loop.index == 33 else '')"),
    "other after a word": CHATML.replace(
        "message['content']",
        "message['content'] + ('!' if 'yes 3' in messages[[loop.index0 - 8, 0] | max].content else '')",
    ),
    "trimmed": CHATML.replace("message['content']", "message['content'] | trim"),
}


def turns_of(count: int) -> list[Turn]:
    return [Turn(f" What is {i}?", CONTEXT[:31], f"yes {i} ", f"no {i}") for i in range(count)]


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_tokens_of_many_turns_do_not_depend_on_how_they_are_rendered(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folder, template(tmp_path, TEMPLATES[kind]))
    found: list[Any] = []
    for whole in (16, 1000):
        monkeypatch.setattr(chat, "_TURNS_RENDERED_WHOLE", whole)
        try:
            sample = encode_sample(tokenizer, CONTEXT, turns_of(40))
            found.append([(piece.mode, piece.tokens) for piece in sample.pieces])
        except BadRow as error:
            found.append([(error.reason, np.zeros(0))])
    assert [mode for mode, _ in found[0]] == [mode for mode, _ in found[1]]
    for (_, recent), (_, exact) in zip(*found, strict=True):
        np.testing.assert_array_equal(recent, exact)


def test_work_is_linear_in_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder)
    rendered = []
    original = type(tokenizer)._render
    monkeypatch.setattr(
        type(tokenizer),
        "_render",
        lambda self, messages, **keywords: (
            rendered.append(len(messages)) or original(self, messages, **keywords)  # type: ignore[func-returns-value]
        ),
    )
    costs = []
    for count in (50, 100, 200):
        rendered.clear()
        encode_sample(tokenizer, CONTEXT, turns_of(count))
        costs.append(sum(rendered))
    assert costs[2] < 4.1 * costs[0] and costs[2] < 60 * 200


def test_rows_with_too_many_turns_are_skipped(folder: Path, tmp_path: Path) -> None:
    turns = [vars(turn) for turn in turns_of(30)]
    row = RawRow(line=1, text=json.dumps({"context": CONTEXT, "turns": turns}))
    tokenizer = load_tokenizer(folder)
    (skipped,) = process_row(row, Settings(max_turns=29), tokenizer).skipped
    assert (skipped.reason, skipped.detail) == ("too_many_turns", "the row has 30 turns; max_turns is 29")
    assert process_row(row, Settings(max_turns=30), tokenizer).sample is not None
    numbered = load_tokenizer(folder, template(tmp_path, TEMPLATES["with the number of the turn"]))
    with pytest.raises(BadRow, match="the row has 401 turns, and the chat template renders a turn by more than"):
        encode_sample(numbered, CONTEXT, turns_of(401))
