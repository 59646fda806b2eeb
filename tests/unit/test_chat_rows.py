"""Preference rows as chat messages: where documents, tools and answers stand, and what has a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.indexed import PreferenceData, path_of
from megatron_longpo.data.preference import BadRow, Mode, Sample, from_tokenised, long_rows, short_rows
from megatron_longpo.errors import DataError
from megatron_longpo.text.chat import BUILT_IN_TEMPLATES, ChatTokenizer, load_tokenizer
from megatron_longpo.text.chat_rows import PLACEHOLDER, encode_chat_row, parse_chat_row
from megatron_longpo.text.preprocess import RawRow, Settings, preprocess, process_row
from tests.support.data import text_row, tokenised_row, write_lines
from tests.support.tokenizers import TEXT, make_fast_tokenizer, package_folder
from tests.unit.test_template_families import losses, text_of

Row = dict[str, Any]
USER, ANSWER = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "By the river."}
OTHER = {"role": "assistant", "content": "Nowhere."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"what": "tower"}'}}],
}
RESULT = {"role": "tool", "name": "find", "content": "on the left bank"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find it.", "parameters": {}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fast_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def qwen(request: pytest.FixtureRequest, folder: Path) -> ChatTokenizer:
    """A tokenizer with a published template that has tools."""
    return load_tokenizer(folder, str(package_folder("trl") / "chat_templates" / f"{request.param}.jinja"))


def encoded(tokenizer: ChatTokenizer, row: Row, system: str | None = None) -> Sample:
    sample = encode_chat_row(tokenizer, parse_chat_row(row, system))
    sample.check()
    return sample


def texts(tokenizer: ChatTokenizer, sample: Sample) -> list[str]:
    return [
        text_of(tokenizer, row.tokens_L) for row in long_rows(sample, slot=0, turns="chained", nll_scope="sequence")
    ]


def chatml(*messages: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)[:-1]


# The same dialogue in the forms that data sets have.
FORMS: dict[str, Row] = {
    "messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "prompt in the answers": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "prompt there once more": {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "prompt as text": {"prompt": USER["content"], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "plain": {"prompt": USER["content"], "chosen": ANSWER["content"], "rejected": OTHER["content"]},
    "a message, not a list": {"prompt": USER, "chosen": ANSWER, "rejected": OTHER},
    "parts": {
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]}
        ],
        "chosen": [ANSWER],
        "rejected": [OTHER],
    },
    "nulls of a table": {
        "prompt": [{**USER, "tool_calls": None, "name": None}],
        "chosen": [{**ANSWER, "tool_calls": None}],
        "rejected": [OTHER],
        "tools": None,
        "short_context": None,
    },
}


@pytest.mark.parametrize("form", list(FORMS))
def test_one_dialogue_in_all_forms(tokenizer: ChatTokenizer, form: str) -> None:
    sample = encoded(tokenizer, FORMS[form])
    asked = ("user", "Where is it?")
    assert texts(tokenizer, sample) == [chatml(asked, ("assistant", m["content"])) for m in (ANSWER, OTHER)]
    rows = long_rows(sample, slot=0, turns="independent", nll_scope="sequence")
    assert [losses(tokenizer, row) for row in rows] == [["By the river.<|im_end|>"], ["Nowhere.<|im_end|>"]]
    assert short_rows(sample, slot=0) == []


def test_plain_text_as_trl_lays_it_out(folder: Path) -> None:
    """Prompt and answer as they are, and the end of the text; without a prompt, it is what both answers begin with."""
    text = load_tokenizer(folder, "text")
    rows: list[Row] = [
        {"prompt": "The tower", "chosen": " stands.", "rejected": " was built."},
        {"chosen": "The tower stands.", "rejected": "The tower was built."},
    ]
    for row in rows:
        sample = encoded(text, row)
        start, end = "<|im_start|>", "<|im_end|>"
        assert texts(text, sample) == [f"{start}The tower stands.{end}", f"{start}The tower was built.{end}"]
        first = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")[0]
        assert losses(text, first) == [f" stands.{end}"]


def test_any_dialogue_may_come_before_the_answer(tokenizer: ChatTokenizer) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, USER, OTHER, {"role": "user", "content": "No?"}]
    sample = encoded(tokenizer, {"prompt": prompt, "chosen": [ANSWER], "rejected": [OTHER]}, system="not used")
    said = [(m["role"], m["content"]) for m in prompt]
    assert texts(tokenizer, sample)[0] == chatml(*said, ("assistant", "By the river."))
    assert [losses(tokenizer, row) for row in long_rows(sample, slot=0, turns="chained", nll_scope="sequence")] == [
        ["By the river.<|im_end|>"],
        ["Nowhere.<|im_end|>"],
    ]
    own = encoded(tokenizer, {**FORMS["messages"], "system": "Arr."}, system="not used")
    all_rows = encoded(tokenizer, FORMS["messages"], system="Be brief.")
    assert texts(tokenizer, own)[0].startswith(chatml(("system", "Arr.")))
    assert texts(tokenizer, all_rows)[0].startswith(chatml(("system", "Be brief.")))


@pytest.mark.parametrize(
    "document", [TEXT.strip(), TEXT, TEXT + "\n\n", " x ."], ids=["text", "line", "lines", "short"]
)
@pytest.mark.parametrize(
    "prompt",
    [
        [USER],
        [{"role": "user", "content": f"Read this:\n{PLACEHOLDER}\n\nWhere is it?"}],
        [{"role": "system", "content": f"{PLACEHOLDER}"}, USER],
        [{"role": "user", "content": f"<<{PLACEHOLDER}>>"}, OTHER, USER],
    ],
    ids=["before the question", "in the question", "system", "earlier turn"],
)
def test_a_document_may_stand_anywhere(tokenizer: ChatTokenizer, prompt: list[Row], document: str) -> None:
    short = document[:7]
    row = {"prompt": prompt, "chosen": [ANSWER], "rejected": [OTHER], "context": document, "short_context": short}
    sample = encoded(tokenizer, row)
    place = (
        prompt
        if any(PLACEHOLDER in m["content"] for m in prompt)
        else [{"role": "user", "content": f"{PLACEHOLDER}\n\nWhere is it?"}]
    )

    def expected(text: str, answer: Row) -> list[int]:
        messages = [*({**m, "content": m["content"].replace(PLACEHOLDER, text)} for m in place), answer]
        whole: list[int] = tokenizer._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)  # type: ignore[attr-defined]
        return whole

    for rows, text in (
        (long_rows(sample, slot=0, turns="chained", nll_scope="sequence"), document),
        (short_rows(sample, slot=0), short),
    ):
        for found, answer in zip(rows, (ANSWER, OTHER), strict=True):
            whole = expected(text, answer)
            # But for the line feed after the last end of turn.
            assert found.tokens_L.tolist() == whole[: len(found.tokens_L)] and len(whole) - len(found.tokens_L) <= 1
            assert losses(tokenizer, found) == [answer["content"] + "<|im_end|>"]
    if document == TEXT.strip() and prompt == [USER]:
        assert text_of(tokenizer, sample.pieces[0].tokens) == f"<|im_start|>user\n{document}"


def test_calls_and_results_of_tools(qwen: ChatTokenizer) -> None:
    row = {"prompt": [USER], "chosen": [CALL, RESULT, ANSWER], "rejected": [OTHER], "tools": TOOLS}
    sample = encoded(qwen, row)
    messages = [
        USER,
        {**CALL, "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"what": "tower"}}}]},
        RESULT,
        ANSWER,
    ]
    whole = qwen._tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)  # type: ignore[attr-defined]
    assert texts(qwen, sample)[0] + "\n" == whole
    row_ = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")[0]
    called, said = losses(qwen, row_)
    assert '{"name": "find", "arguments": {"what": "tower"}}' in called and called.endswith("<|im_end|>")
    assert said == "By the river.<|im_end|>"
    assert "left bank" not in called + said and "think" not in called + said
    history = {"prompt": [USER, CALL, RESULT], "chosen": [ANSWER], "rejected": [OTHER], "tools": json.dumps(TOOLS)}
    first = long_rows(encoded(qwen, history), slot=0, turns="chained", nll_scope="sequence")[0]
    assert losses(qwen, first) == ["By the river.<|im_end|>"]


BAD: dict[str, tuple[Row, str, str]] = {
    "no answer": ({"rejected": None}, "missing_key", "no rejected"),
    "no prompt": ({"prompt": []}, "wrong_type", "does not end with a message to the assistant"),
    "prompt ends with an answer": ({"prompt": [USER, ANSWER]}, "wrong_type", "does not end with"),
    "answer is a question": ({"chosen": [USER]}, "wrong_type", "begin and end with a message of the assistant"),
    "answer ends with a result": ({"chosen": [CALL, RESULT]}, "wrong_type", "begin and end"),
    "empty": ({"chosen": [{"role": "assistant", "content": " "}]}, "empty_turn", "empty answer"),
    "null": ({"chosen": [{"role": "assistant", "content": None}]}, "wrong_type", "no content"),
    "refused": ({"chosen": [{"role": "assistant", "refusal": "no"}]}, "unknown_key", "refusal"),
    "role": ({"prompt": [{"role": "human", "content": "?"}]}, "wrong_type", "'human'"),
    "picture": ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type", "other than text"),
    "number": ({"prompt": 7}, "wrong_type", "neither text nor a list"),
    "document without a place": (
        {"prompt": [{"role": "system", "content": "s"}, RESULT], "context": "c"},
        "wrong_type",
        "neither a user's message nor",
    ),
    "two places": (
        {"prompt": [{"role": "user", "content": PLACEHOLDER * 2}], "context": "c"},
        "wrong_type",
        "2 times",
    ),
    "place without a document": ({"prompt": [{"role": "user", "content": PLACEHOLDER}]}, "no_context", "no context"),
    "chunk of nothing": ({"short_context": "c"}, "no_context", "no context"),
    "foreign chunk": ({"context": "c", "short_context": "d"}, "chunk_not_in_context", "not part"),
    "system twice": (
        {"system": "a", "prompt": [{"role": "system", "content": "b"}, USER]},
        "wrong_type",
        "and a system message",
    ),
    "arguments": (
        {"chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "wrong_type",
        "arguments is not JSON",
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_rows_have_a_reason(kind: str) -> None:
    change, reason, detail = BAD[kind]
    with pytest.raises(BadRow, match=detail) as caught:
        parse_chat_row({**FORMS["messages"], **change}, None)
    assert caught.value.reason == reason


def test_rows_of_both_kinds_in_a_table(folder: Path, tmp_path: Path) -> None:
    """Columns that other rows have are null in a row, and keys of other messages too."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        FORMS["messages"],
        {**FORMS["messages"], "context": TEXT, "short_context": TEXT[:50], "weight": 2.0},
        text_row(),
    ]
    columns = sorted({key for row in rows for key in row})
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    for name in ("a.parquet", "a.jsonl"):
        manifest = preprocess([str(tmp_path / name)], tmp_path / f"out-{name}", Settings(tokenizer=str(folder)))
        assert manifest.samples + sum(manifest.skip_reasons.values()) == 3 == manifest.rows, manifest.skip_reasons
        assert manifest.samples == 3 and manifest.samples_without_short == 1
    first, second = ((tmp_path / f"out-{name}.bin").read_bytes() for name in ("a.parquet", "a.jsonl"))
    assert first == second


# --------------------------------------------------------------------------------------------------
# Unknown keys, equal answers, duplicates, masks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        text_row(3, sistem="You are a pirate."),
        {**text_row(3), "turns": [{**text_row(3)["turns"][0], "score": 1}]},
        {**FORMS["messages"], "prompt_id": "x"},
        {**FORMS["messages"], "chosen": [{**ANSWER, "refusal": "no"}]},
    ],
    ids=["row", "turn", "chat row", "message"],
)
def test_keys_that_nothing_reads_are_refused(tokenizer: ChatTokenizer, row: Row) -> None:
    result = process_row(RawRow(1, json.dumps(row)), Settings(), tokenizer)
    assert result.sample is None and [s.reason for s in result.skipped] == ["unknown_key"]
    ignored = Settings(ignore_keys=("sistem", "score", "prompt_id"))
    assert (process_row(RawRow(1, json.dumps(row)), ignored, tokenizer).sample is None) == ("refusal" in str(row))


@pytest.mark.parametrize("kind", ["text", "tokenised"])
def test_keys_of_the_first_row_are_told_at_once(folder: Path, tmp_path: Path, kind: str) -> None:
    row = {**(text_row() if kind == "text" else tokenised_row()), "source": "web", "score": 1}
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(row)])
    made = {"tokenizer": str(folder)} if kind == "text" else {"vocab_size": 64}
    with pytest.raises(DataError, match=r"'score', 'source', which nothing reads; .* --ignore-keys score source"):
        preprocess([str(path)], tmp_path / "out", Settings(**made))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))
    ignored = Settings(**made, ignore_keys=("score", "source"))  # type: ignore[arg-type]
    assert preprocess([str(path)], tmp_path / "out", ignored).samples == 1


def test_equal_answers_and_duplicates_are_kept_aside_with_a_count(folder: Path, tmp_path: Path) -> None:
    equal = text_row(0, turns=2)
    equal["turns"][1]["rejected"] = equal["turns"][1]["chosen"]
    spaced = text_row(1)
    spaced["turns"][0] |= {"chosen": "Yes.", "rejected": "Yes."}
    rows = [
        equal,
        spaced,
        text_row(2),
        text_row(2, id="another"),
        {**FORMS["messages"], "rejected": [ANSWER]},
        text_row(2),
    ]
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    manifest = preprocess([str(path)], tmp_path / "out", Settings(tokenizer=str(folder)))
    assert (manifest.samples, manifest.turns, manifest.rows) == (2, 2, 6)
    assert manifest.skip_reasons == {"identical_answers": 3, "no_turn_left": 1, "duplicate": 2}
    skipped = [json.loads(line) for line in path_of(tmp_path / "out", "rejects.jsonl").read_text().splitlines()]
    assert [r["line"] for r in skipped if r["reason"] == "duplicate"] == [4, 6]
    assert "number 1 of the output" in next(r["detail"] for r in skipped if r["reason"] == "duplicate")
    kept = preprocess([str(path)], tmp_path / "all", Settings(tokenizer=str(folder), keep_duplicates=True))
    assert kept.samples == 6 and kept.turns == 7 and not kept.skip_reasons


def test_answers_that_the_template_makes_equal_are_equal(folder: Path, tmp_path: Path) -> None:
    """Relatives: blanks that a template trims."""
    trimmed = tmp_path / "template.jinja"
    trimmed.write_text(BUILT_IN_TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim"))
    row = text_row()
    row["turns"][0] |= {"chosen": "Yes.", "rejected": " Yes.\n"}
    result = process_row(RawRow(1, json.dumps(row)), Settings(), load_tokenizer(folder, str(trimmed)))
    assert [s.reason for s in result.skipped] == ["identical_answers"]
    tokenised = {
        **tokenised_row(),
        "rejected_input_ids": [1, 2, 3, 20, 21],
        "rejected_labels": [-100, -100, -100, 20, 21],
    }
    result = process_row(RawRow(1, json.dumps(tokenised)), Settings(vocab_size=64), None)
    assert [s.reason for s in result.skipped] == ["identical_answers"]


def test_duplicates_are_found_after_a_break(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_longpo.text import preprocess as module

    rows = [text_row(i % 50) for i in range(150)]
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    settings = Settings(tokenizer=str(folder))
    original = module.process_row

    def breaks(row: RawRow, *others: Any) -> Any:
        if row.line == 100:
            raise KeyboardInterrupt
        return original(row, *others)

    monkeypatch.setattr(module, "process_row", breaks)
    with pytest.raises(KeyboardInterrupt):
        preprocess([str(path)], tmp_path / "out", settings)
    monkeypatch.undo()
    manifest = preprocess([str(path)], tmp_path / "out", settings)
    assert manifest.samples == 50 and manifest.skip_reasons == {"duplicate": 100} and manifest.rows == 150
    assert len(PreferenceData(tmp_path / "out")) == 50


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([1, 1, 1, 1, 1, 0], None),
        ([0, 1, 1, 1, 1, 0], None),
        ([1, 0, 1, 1, 1, 0], "mask_with_holes"),
        ([1, 1, 1, 2, 2, 0], "wrong_type"),
        ([1, 1, 1, 1, 0, 0], "labels_differ"),
    ],
)
def test_attention_masks_hide_padding_only(mask: list[int], reason: str | None) -> None:
    row = {**tokenised_row(), "chosen_attention_mask": mask}
    if reason is None:
        assert from_tokenised(row, 64).length(Mode.CHOSEN) == sum(mask)
        return
    with pytest.raises(BadRow) as caught:
        from_tokenised(row, 64)
    assert caught.value.reason == reason
