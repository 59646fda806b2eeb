"""InfiniteBench's rows and their middle truncation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.errors import DataError
from megatron_longpo.evaluation.samples import EvalSample, middle_cut
from megatron_longpo.evaluation.suites import infinitebench
from tests.support.tokenizers import prompt_counter, published_tokenizer


def test_infinitebench_rows(tmp_path: Path) -> None:
    good = {"context": "Book.", "input": "Who?", "answer": ["Ann"], "options": ["Bob", "Ann", "Cid", "Dan"]}
    lines = [
        json.dumps(good),
        "not json",
        json.dumps({**good, "options": ["x"]}),
        json.dumps({**good, "answer": ["Eve"]}),
        json.dumps({**good, "context": " "}),
        json.dumps({**good, "answer": ["Ann", "B"]}),
        "",
    ]
    (tmp_path / "longbook_choice_eng.jsonl").write_text("\n".join(lines))
    books = infinitebench.read_task(tmp_path, "longbook_choice_eng")
    assert [row.answers for row in books.rows] == [["Ann", "B"], ["Ann", "B"]]
    assert [line.line for line in books.skipped] == [2, 3, 4, 5]
    prompt = infinitebench.prompt_of(books.rows[0], "longbook_choice_eng", "chat")
    assert prompt.startswith("Read the book and answer the question.\n\nBook.\n\nQuestion: Who?\n\nOnly one of")
    assert prompt.endswith("\nA. Bob\nB. Ann\nC. Cid\nD. Dan")
    with pytest.raises(DataError, match="cannot be read"):
        infinitebench.read_task(tmp_path, "longbook_qa_eng")


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_middle_cut_keeps_both_ends(ids: list[int], length: int) -> None:
    front, back = middle_cut(ids, length)
    if len(ids) <= length:
        assert list(front) == ids and not back
    else:
        assert (
            list(front) == ids[: length // 2] and list(front) + list(back) == ids[: length // 2] + ids[-length // 2 :]
        )
        assert len(front) + len(back) == length


def test_books_are_cut_to_the_length(tmp_path: Path) -> None:
    tokenizer = published_tokenizer("mistral-v1", tmp_path)
    count = prompt_counter(tokenizer)
    book = "BEGIN " + " ".join(f"word{i}" for i in range(3000)) + " END"
    row = infinitebench.Book(context=book, question="Who?", answers=["Ann"], options=None)

    def sample_of(length: int) -> EvalSample:
        return infinitebench.sample_of(
            row, task="longbook_qa_eng", index=0, length=length, prompts="chat", tokenizer=tokenizer, count=count
        )

    sample = sample_of(2000)
    assert sample.details["cut"] and 0.98 * 2000 <= sample.prompt_tokens + sample.max_tokens <= 2000
    assert sample.message.startswith("Read the book below and answer a question.\n\nBEGIN")
    assert sample.message.endswith("END\n\nQuestion: Who?\n\nBe very concise.")
    whole = sample_of(100_000)
    assert not whole.details["cut"] and book in whole.message
