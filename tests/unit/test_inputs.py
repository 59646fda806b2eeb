"""What lies in a folder beside the data: the right rows once, or a refusal that names what is in the way."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_longpo.errors import DataError
from megatron_longpo.runtime.reading import ReadingConfig, TooLarge, WrongFormat, read_json_rows
from megatron_longpo.text.documents import find_files, read_documents
from megatron_longpo.text.preprocess import input_files, read_rows


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": number} for number in range(start, start + count)]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines_of(rows).encode()))
    else:
        path.write_text(lines_of(rows))
    return path


def read(folder: Path, split: str | None = None) -> list[int]:
    found = read_rows(input_files([str(folder)], split=split), 0)
    return [(row.columns if row.text is None else json.loads(row.text))["id"] for row in found]  # type: ignore[index]


def saved(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    import datasets

    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    if list(made) == ["only"]:
        made["only"].save_to_disk(str(folder))
    else:
        datasets.DatasetDict(made).save_to_disk(str(folder))
    return folder


# --------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------


def shards(folder: Path) -> Path:
    put(folder / "data/train-00000-of-00002.parquet", rows_of(2))
    put(folder / "data/train-00001-of-00002.parquet", rows_of(3, 2))
    put(folder / "data/test-00000-of-00001.parquet", rows_of(3, 5))
    return folder


def lines(folder: Path) -> Path:
    put(folder / "my.train.jsonl", rows_of(5))
    put(folder / "my.test.jsonl", rows_of(3, 5))
    return folder


def folders(folder: Path) -> Path:
    put(folder / "train/part.jsonl", rows_of(5))
    put(folder / "test/rest.jsonl", rows_of(3, 5))
    return folder


SPLITS: dict[str, Callable[[Path], Path]] = {
    "DatasetDict": lambda folder: saved(folder, train=rows_of(5), test=rows_of(3, 5)),
    "shards": shards,
    "names": lines,
    "folders": folders,
}


@pytest.mark.parametrize("kind", list(SPLITS))
def test_one_of_several_splits_must_be_named(tmp_path: Path, kind: str) -> None:
    folder = SPLITS[kind](tmp_path / "data")
    with pytest.raises(DataError, match=r"has the splits (test, train|train, test); choose one with --split NAME"):
        read(folder)
    assert read(folder, "train") == list(range(5))
    assert read(folder, "test") == [5, 6, 7]
    assert sorted(read(folder, "all")) == list(range(8))
    with pytest.raises(DataError, match="has no split validation; choose one of"):
        read(folder, "validation")


def test_splits_of_one_purpose_are_told_apart(tmp_path: Path) -> None:
    for start, name in enumerate(("train_prefs", "train_sft", "test_prefs")):
        put(tmp_path / f"data/{name}-00000-of-00001.parquet", rows_of(1, start))
    with pytest.raises(DataError, match="has the splits test_prefs, train_prefs, train_sft"):
        read(tmp_path)
    assert read(tmp_path, "train_sft") == [1]


@pytest.mark.parametrize(
    "name", ["training_a.jsonl", "trainer.jsonl", "contest.jsonl", "attestation.jsonl", "pairs.jsonl"]
)
def test_a_single_split_needs_no_name(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, rows_of(2))
    assert read(tmp_path) == [0, 1]


def test_a_split_beside_files_without_one(tmp_path: Path) -> None:
    put(tmp_path / "pairs.jsonl", rows_of(2))
    put(tmp_path / "pairs_test.jsonl", rows_of(2, 2))
    with pytest.raises(DataError, match=r"has the splits \(none\), test"):
        read(tmp_path)


# --------------------------------------------------------------------------------------------------
# Caches, versions, hidden files
# --------------------------------------------------------------------------------------------------


def test_caches_of_saved_data_are_no_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "data", only=rows_of(4))
    data = next(folder.glob("*.arrow"))
    for name in ("cache-0123456789abcdef.arrow", "indices-0.arrow", "tmpabc.arrow", "other.arrow"):
        shutil.copy(data, folder / name)
    assert read(folder) == [0, 1, 2, 3]
    data.unlink()
    with pytest.raises(DataError, match=r"lacks data-00000-of-00001.arrow, which data/state.json names"):
        read(folder)


@pytest.mark.parametrize(
    "beside",
    [
        ".cache/huggingface/pairs.jsonl",
        ".pairs.jsonl.writing",
        "pairs.jsonl.rejects.jsonl",
        "pairs.jsonl.work/part-00-of-01/long.jsonl",
        "out.partial/rows.jsonl",
        "config.json",
        "pairs.jsonl~",
        "notes.txt",
    ],
)
def test_what_lies_beside_the_rows_is_left_out(tmp_path: Path, beside: str) -> None:
    put(tmp_path / "pairs.jsonl", rows_of(3))
    put(tmp_path / beside, rows_of(2, 7))
    assert read(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    "names",
    [
        ("v1/pairs.jsonl", "v2/pairs.jsonl"),
        ("pairs.jsonl", "pairs.jsonl.gz"),
        ("pairs.jsonl", "old/pairs_2024.jsonl"),
        ("pairs.jsonl", "pairs.parquet"),
        ("a/0.parquet", "b/0.parquet"),
    ],
)
def test_the_same_data_twice_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        put(tmp_path / name, rows_of(2))
    with pytest.raises(DataError, match="name the files"):
        read(tmp_path)


# --------------------------------------------------------------------------------------------------
# JSON in other shapes
# --------------------------------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"
SHAPES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "lines": lambda rows: lines_of(rows).encode(),
    "lines with a mark": lambda rows: MARK + lines_of(rows).encode(),
    "array on one line": lambda rows: json.dumps(rows).encode(),
    "array, indented": lambda rows: json.dumps(rows, indent=2).encode(),
    "array, a row a line": lambda rows: ("[" + ",\n".join(map(json.dumps, rows)) + "]\n").encode(),
    "array with a mark": lambda rows: MARK + json.dumps(rows, indent=4).encode(),
    "objects, indented": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "objects, indented, after blank lines": lambda rows: b"\n\n" + json.dumps(rows, indent="\t").encode() + b"\n\n",
    "carriage returns": lambda rows: lines_of(rows).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.json.gz"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_rows_of_json_in_any_shape(tmp_path: Path, shape: str, name: str) -> None:
    content = SHAPES[shape](rows_of(3))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(tmp_path / name) == [0, 1, 2]
    if not name.endswith(".gz"):
        assert read(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"id": 1}'.encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
        (b'[{"id": 1},\n{"id": 2}\n', "begins as a JSON array and is none"),
        (b'{\n "id": 1\n}\n{\n "id": \n', "begins as JSON over several lines and is broken"),
        (b"[\n\xff\n]", "it is not UTF-8"),
        (b'{\n"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 levels"),
        (b"[\n" + b"[" * 70 + b"]" * 70 + b"]", "nested more than 64 levels"),
    ],
)
def test_json_that_is_broken_as_a_whole_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "pairs.json").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "pairs.json")


def test_limits_hold_for_json_that_is_read_whole() -> None:
    content = json.dumps(rows_of(100), indent=1).encode()
    with pytest.raises(TooLarge, match="of more than 50 bytes"):
        list(read_json_rows(io.BytesIO(content), ReadingConfig(max_json_bytes=50)))
    rows = list(
        read_json_rows(
            io.BytesIO(json.dumps([{"a": "x" * 99}, {}], indent=1).encode()), ReadingConfig(max_row_bytes=50)
        )
    )
    assert [row.too_long is None for row in rows] == [False, True]
    with pytest.raises(WrongFormat, match="a JSON array on one line"):
        list(read_json_rows(io.BytesIO(json.dumps(rows_of(99)).encode()), ReadingConfig(max_row_bytes=50)))


def test_lines_that_are_broken_are_rows_still() -> None:
    content = b'[1, 2]\n\n{"id": 1}\n{broken\n'
    assert [row.raw for row in read_json_rows(io.BytesIO(content))] == content.splitlines(keepends=True)


# --------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------


def documents(folder: Path, split: str | None = None) -> list[str]:
    return sorted(d.text for d in read_documents(find_files([str(folder)], "auto", split=split), "text"))


def test_documents_have_splits_and_things_beside_them_too(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", [{"text": "one"}])
    put(tmp_path / "test.jsonl", [{"text": "two"}])
    put(tmp_path / ".git/packed.jsonl", [{"text": "hidden"}])
    put(tmp_path / "pairs.jsonl.rejects.jsonl", [{"text": "rejected"}])
    (tmp_path / "test_of_time.txt").write_text("three")
    with pytest.raises(DataError, match="has the splits test, train; choose one with --split"):
        documents(tmp_path)
    assert documents(tmp_path, "train") == ["one", "three"]
    assert documents(tmp_path, "all") == ["one", "three", "two"]


@pytest.mark.parametrize("shape", list(SHAPES))
def test_documents_of_json_in_any_shape(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(SHAPES[shape]([{"text": "one"}, {"text": "two"}]))
    assert documents(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("shape", list(SHAPES))
def test_files_of_the_evaluation_in_any_shape(tmp_path: Path, shape: str) -> None:
    from megatron_longpo.evaluation.materials import read_words
    from megatron_longpo.evaluation.suites.infinitebench import read_task

    rows = [{"context": "c", "input": "q", "answer": ["a"]}] * 2
    (tmp_path / "longbook_qa_eng.jsonl").write_bytes(SHAPES[shape](rows))
    assert len(read_task(tmp_path, "longbook_qa_eng").rows) == 2
    (tmp_path / "words.txt").write_bytes(MARK + b"one\ntwo\n")
    assert read_words(str(tmp_path / "words.txt")) == ["one", "two"]


def test_short_context_data_has_no_caches(tmp_path: Path) -> None:
    from megatron_longpo.evaluation.suites.short_context import local_data

    folder = saved(tmp_path / "data", train=rows_of(2), test=rows_of(2))
    (real,) = (folder / "test").glob("*.arrow")
    shutil.copy(real, folder / "test" / "cache-0123456789abcdef.arrow")
    found = local_data(folder)
    assert found is not None and found.files["test"] == [str(real)] and len(found.files["train"]) == 1
