"""Preprocessing: any input line becomes a sample or is skipped and counted; breaks and workers change nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo.data.indexed import PreferenceData, path_of, read_manifest
from megatron_longpo.errors import DataError
from megatron_longpo.text import preprocess as module
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, ChatTokenizer, load_tokenizer
from megatron_longpo.text.preprocess import RawRow, Settings, preprocess, process_row
from tests.support.data import text_row, tokenised_row, write_lines
from tests.support.tokenizers import TEXT, make_fast_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fast_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    return load_tokenizer(tokenizer_folder)


def test_bad_lines_are_kept_aside_with_their_numbers(tmp_path: Path, tokenizer_folder: Path) -> None:
    empty_answer = text_row(6, turns=2)
    empty_answer["turns"][1]["chosen"] = " "
    foreign = text_row(7)
    foreign["turns"][0]["short_context"] = "nowhere to be found"
    lines: list[str | bytes] = [
        json.dumps(text_row(1)),
        "{not json",
        "",
        b"\xff\xfe broken",
        json.dumps([1, 2]),
        json.dumps(empty_answer),
        json.dumps(foreign),
        json.dumps(text_row(8, context="")),
        json.dumps(text_row(9, turns=0)),
        json.dumps(text_row(10, context=TEXT + "<|im_end|>")),
        json.dumps(text_row(11, context=TEXT * 30)),
        json.dumps(text_row(12)),
    ]
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    manifest = preprocess([str(path)], tmp_path / "out", Settings(tokenizer=str(tokenizer_folder), seq_length=3000))
    assert manifest.samples == 3
    assert manifest.skip_reasons == {
        "not_json": 1,
        "blank_line": 1,
        "not_utf8": 1,
        "not_an_object": 1,
        "empty_turn": 1,
        "chunk_not_in_context": 1,
        "no_turn_left": 1,
        "no_context": 1,
        "no_turn": 1,
        "special_token_in_text": 1,
        "long_row_too_long": 1,
    }
    rejects = [json.loads(line) for line in path_of(tmp_path / "out", "rejects.jsonl").read_text().splitlines()]
    assert sorted({r["line"] for r in rejects}) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert next(r for r in rejects if r["reason"] == "empty_turn")["turn"] == 1
    assert len(PreferenceData(tmp_path / "out")[1].turn_pieces()) == 1


def test_weights_of_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [text_row(0), text_row(1, weight=0.25), text_row(2, weight=-1), text_row(3, weight=3)]
    path = write_lines(tmp_path / "pairs.jsonl", [json.dumps(row) for row in rows])
    manifest = preprocess([str(path)], tmp_path / "out", Settings(tokenizer=str(tokenizer_folder)))
    assert (manifest.samples, manifest.skip_reasons) == (3, {"bad_weight": 1})
    assert PreferenceData(tmp_path / "out").weights.tolist() == [1, 0.25, 3]
    row = {**tokenised_row(), "weight": 2}
    path = write_lines(tmp_path / "tokenised.jsonl", [json.dumps(row)])
    preprocess([str(path)], tmp_path / "ids", Settings(vocab_size=101))
    assert PreferenceData(tmp_path / "ids").weights.tolist() == [2]


def test_a_lone_surrogate_is_kept_aside(tokenizer: ChatTokenizer) -> None:
    row = text_row(context=TEXT + "\ud800")
    result = process_row(RawRow(1, json.dumps(row)), Settings(tokenizer="t"), tokenizer)
    assert result.sample is None and result.skipped


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=6),
    lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=4), c, max_size=3),
    max_leaves=8,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_line_is_a_sample_or_a_counted_reject(tokenizer: ChatTokenizer, data: st.DataObject) -> None:
    """Good rows with any part replaced by anything, and plain junk, of both schemas."""
    kind = data.draw(st.sampled_from(["text", "turn", "tokenised", "junk", "raw"]))
    row: Any
    if kind == "text":
        row = text_row(turns=2)
        row[data.draw(st.sampled_from(["context", "turns", "id"]))] = data.draw(_json)
    elif kind == "turn":
        row = text_row(turns=2)
        row["turns"][0][data.draw(st.sampled_from(["instruction", "short_context", "chosen", "rejected"]))] = data.draw(
            _json
        )
    elif kind == "tokenised":
        row = tokenised_row()
        row[data.draw(st.sampled_from(sorted(row)))] = data.draw(_json)
    elif kind == "junk":
        row = data.draw(_json)
    text = data.draw(st.text(max_size=40)) if kind == "raw" else json.dumps(row)
    for tok, chosen in ((tokenizer, Settings(tokenizer="t")), (None, Settings(vocab_size=64))):
        result = process_row(RawRow(1, text), chosen, tok)
        assert result.sample is not None or result.skipped
        for bad in result.skipped:
            assert bad.reason and bad.detail


def test_the_manifest_has_the_template_and_how_its_answers_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [json.dumps(text_row(1))])
    manifest = preprocess([str(path)], tmp_path / "out", Settings(str(tokenizer_folder), chat_template="chatml"))
    tokenizer = load_tokenizer(tokenizer_folder, "chatml")
    assert manifest.chat_template == BUILT_IN_TEMPLATES["chatml"] == tokenizer.template
    assert [tokenizer.encode("<|im_end|>", continues=False)] == [manifest.answer_end_ids]
    # Version 0.1 wrote neither, and its files stay readable.
    content = json.loads(path_of(tmp_path / "out", "json").read_text())
    del content["manifest_sha256"], content["chat_template"], content["answer_end_ids"]
    content["manifest_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path_of(tmp_path / "out", "json").write_text(json.dumps(content))
    old = read_manifest(tmp_path / "out")
    assert old.chat_template is None and old.answer_end_ids == [] and old.template_hash == tokenizer.template_hash


def test_workers_and_formats_change_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [text_row(i, turns=1 + i % 3) for i in range(40)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    chosen = Settings(tokenizer=str(tokenizer_folder))
    for name, workers in (("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl.gz", 1), ("a.parquet", 1)):
        preprocess([str(tmp_path / name)], tmp_path / f"out-{name}-{workers}", chosen, workers=workers)
    first = (tmp_path / "out-a.jsonl-1.bin").read_bytes()
    for other in ("a.jsonl-2", "a.jsonl.gz-1", "a.parquet-1"):
        assert (tmp_path / f"out-{other}.bin").read_bytes() == first


def test_tokenised_rows_of_jsonl_parquet_and_datasets_agree(tmp_path: Path) -> None:
    import datasets

    rows = [tokenised_row() for _ in range(5)]
    write_lines(tmp_path / "a.jsonl", [json.dumps(r) for r in rows])
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    outputs = []
    for name in ("a.jsonl", "a.parquet", "folder"):
        manifest = preprocess(
            [str(tmp_path / name)], tmp_path / f"out-{name}", Settings(vocab_size=64, keep_duplicates=True)
        )
        assert manifest.samples == 5 and not manifest.independent_turns
        outputs.append((tmp_path / f"out-{name}.bin").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_broken_off_and_started_again(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str | bytes] = [json.dumps(text_row(i)) if i % 7 else "broken" for i in range(200)]
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    chosen = Settings(tokenizer=str(tokenizer_folder))
    preprocess([str(path)], tmp_path / "whole", chosen)
    original = module.process_row
    seen: list[int] = []

    def failing(row: RawRow, *rest: Any) -> Any:
        seen.append(row.line)
        if row.line == limits[0]:
            raise KeyboardInterrupt
        return original(row, *rest)

    monkeypatch.setattr(module, "process_row", failing)
    limits = [0]
    for limits[0] in (100, 150):
        with pytest.raises(KeyboardInterrupt):
            preprocess([str(path)], tmp_path / "broken", chosen)
    limits[0] = -1
    seen.clear()
    preprocess([str(path)], tmp_path / "broken", chosen)
    assert seen[0] > 64, "what was committed is not done again"
    for suffix in ("bin", "idx", "json", "rejects.jsonl"):
        assert path_of(tmp_path / "whole", suffix).read_bytes() == path_of(tmp_path / "broken", suffix).read_bytes()


def test_wrong_inputs_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = write_lines(tmp_path / "t.jsonl", [json.dumps(text_row())])
    tokenised = write_lines(tmp_path / "k.jsonl", [json.dumps(tokenised_row())])
    junk = write_lines(tmp_path / "j.jsonl", ["x"])
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no more")
    with_tokenizer = Settings(tokenizer=str(tokenizer_folder))
    cases = [
        ([str(tmp_path / "none")], with_tokenizer, "no such file"),
        ([str(text)], Settings(), "either --tokenizer"),
        ([str(text)], Settings(vocab_size=64), "is text"),
        ([str(tokenised)], with_tokenizer, "already tokenised"),
        ([str(junk)], with_tokenizer, "no sample is left"),
        ([str(tmp_path / "p.parquet")], Settings(vocab_size=64), "cannot be read"),
        ([str(tmp_path)], Settings(vocab_size=64), "holds .parquet and .jsonl files"),
        ([str(tokenised)], Settings(vocab_size=0), "must be positive"),
    ]
    for number, (inputs, chosen, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            preprocess(inputs, tmp_path / f"out{number}", chosen)
    preprocess([str(text)], tmp_path / "twice", with_tokenizer)
    preprocess([str(text)], tmp_path / "twice", with_tokenizer)  # the same again is no error
    with pytest.raises(DataError, match="exists already"):
        preprocess([str(text)], tmp_path / "twice", Settings(tokenizer=str(tokenizer_folder), seq_length=5000))
