"""Templates of today's models: dates, names, arguments, and what travels with the data."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_longpo.data.indexed import PreferenceData, path_of, read_manifest
from megatron_longpo.data.preference import long_rows, short_rows
from megatron_longpo.errors import DataError
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, load_tokenizer
from megatron_longpo.text.preprocess import RawRow, Settings, preprocess, process_row
from tests.support.data import text_row, write_lines
from tests.support.tokenizers import make_fast_tokenizer, make_sentencepiece

CHATML = BUILT_IN_TEMPLATES["chatml"]
TODAYS_DATE = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + CHATML
# A day begins first and last here, so their dates always differ.
ZONES = ("Pacific/Kiritimati", "Pacific/Niue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fast_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "pairs.jsonl", [json.dumps(text_row(i)) for i in range(3)])


def template(tmp_path: Path, text: str) -> str:
    (tmp_path / "template.jinja").write_text(text)
    return str(tmp_path / "template.jinja")


def test_a_date_is_fixed_for_the_run(
    folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = template(tmp_path, TODAYS_DATE)
    made = []
    try:
        for zone in ZONES:
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            prefix = tmp_path / zone.rpartition("/")[2]
            manifest = preprocess([str(pairs)], prefix, Settings(tokenizer=str(folder), chat_template=name))
            made.append((path_of(prefix, "bin").read_bytes(), manifest.template_date))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert made[0] == made[1] and made[0][1] is not None


def test_a_date_can_be_chosen_and_is_kept(folder: Path, pairs: Path, tmp_path: Path) -> None:
    import datetime

    name, prefix = template(tmp_path, TODAYS_DATE), tmp_path / "out"
    old = Settings(tokenizer=str(folder), chat_template=name, template_date=datetime.date(2024, 2, 29))
    manifest = preprocess([str(pairs)], prefix, old)
    assert manifest.template_date == "2024-02-29" == manifest.settings["template_date"]
    tokenizer = load_tokenizer(folder, name, template_date=datetime.date(2024, 2, 29))
    assert "Today is 29 Feb 2024." in tokenizer.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    # The same command on a later day finds its own output; another date is another output.
    again = preprocess([str(pairs)], prefix, Settings(tokenizer=str(folder), chat_template=name))
    assert again == manifest
    with pytest.raises(DataError, match="exists already"):
        other = Settings(tokenizer=str(folder), chat_template=name, template_date=datetime.date(2024, 3, 1))
        preprocess([str(pairs)], prefix, other)


def test_templates_without_a_date_leave_no_trace_of_one(folder: Path, pairs: Path, tmp_path: Path) -> None:
    manifest = preprocess([str(pairs)], tmp_path / "out", Settings(tokenizer=str(folder)))
    assert manifest.template_date is None and manifest.settings == {"short_seq_length": 32768}


def test_the_manifest_has_what_must_travel(folder: Path, pairs: Path, tmp_path: Path) -> None:
    polite = CHATML.replace("message['content']", "message['content'] + ('!' if loud else '')")
    settings = Settings(
        tokenizer=str(folder), chat_template=template(tmp_path, polite), chat_template_kwargs={"loud": True}
    )
    manifest = preprocess([str(pairs)], tmp_path / "out", settings)
    assert manifest.chat_template == polite and manifest.chat_template_kwargs == {"loud": True}
    assert manifest.special_tokens == {"<|im_start|>": 0, "<|im_end|>": 1} and manifest.answer_end_ids == [1]
    assert (manifest.rows, manifest.samples, manifest.samples_without_short) == (3, 3, 0)
    assert read_manifest(tmp_path / "out") == manifest


def test_sentencepiece_tokenizers_have_what_transformers_passes_to_templates(tmp_path: Path) -> None:
    """Not only the messages: the clock, JSON, refusals and loop controls."""
    text = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') | length | tojson }}"
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path), template(tmp_path, text))
    assert tokenizer.render([{"role": "user", "content": "hi"}], add_generation_prompt=True) == "4hi</s>"


@pytest.mark.parametrize("chosen", [None, "rag", "default"])
def test_named_templates(folder: Path, tmp_path: Path, chosen: str | None) -> None:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder)
    fast.chat_template = {"rag": CHATML, "tool_use": CHATML}
    fast.save_pretrained(tmp_path / "named")
    if chosen == "rag":
        assert load_tokenizer(tmp_path / "named", "rag").template == CHATML
        return
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "named", chosen)
    assert "rag, tool_use" in str(caught.value)


def test_a_system_key_is_used(folder: Path, pairs: Path, tmp_path: Path) -> None:
    rows = [
        text_row(0, system="You are a pirate."),
        text_row(1),
        text_row(2, system=7),
        text_row(3, system="<|im_end|>"),
    ]
    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    settings = Settings(tokenizer=str(folder), system_prompt="Be brief.")
    manifest = preprocess([str(path)], tmp_path / "out", settings)
    assert manifest.skip_reasons == {"wrong_type": 1, "special_token_in_text": 1}
    assert manifest.system_prompt == "Be brief." == manifest.settings["system_prompt"]
    data, tokenizer = PreferenceData(tmp_path / "out"), load_tokenizer(folder)
    for sample, said in zip((data[0], data[1]), ("You are a pirate.", "Be brief."), strict=True):
        for row in [*long_rows(sample, slot=0, turns="chained", nll_scope="sequence"), *short_rows(sample, slot=0)]:
            assert tokenizer.decode(row.tokens_L.tolist()).startswith(f"system\n{said}\nuser\n")


def test_a_template_without_system_messages_is_named(folder: Path, tmp_path: Path) -> None:
    row = RawRow(line=1, text=json.dumps(text_row(0, system="You are a pirate.")))
    plain = load_tokenizer(folder, "mistral")
    (skipped,) = process_row(row, Settings(), plain).skipped[:1]
    assert skipped.reason == "template" and "no system messages" in skipped.detail
    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(text_row())])
    settings = Settings(tokenizer=str(folder), chat_template="mistral", system_prompt="Be brief.")
    with pytest.raises(DataError, match=r"--system-prompt 'Be brief\.': the chat template has no system messages"):
        preprocess([str(path)], tmp_path / "out", settings)
