"""Reading files of others: kinds of files, symbolic links, lengths of lines, growth of compressed files, nesting of JSON."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_longpo.data.indexed import read_manifest
from megatron_longpo.errors import DataError, LongPOError
from megatron_longpo.evaluation.materials import read_hotpotqa, read_squad, read_words
from megatron_longpo.evaluation.results import read_results
from megatron_longpo.evaluation.suites.infinitebench import read_task
from megatron_longpo.evaluation.suites.short_context import local_data
from megatron_longpo.generation.stages import read_stage_manifest
from megatron_longpo.runtime.files import NotRegularFile, open_regular
from megatron_longpo.runtime.reading import (
    MAX_JSON_DEPTH,
    ReadingConfig,
    TooLarge,
    opened,
    parse_json,
    read_json,
    read_lines,
)
from megatron_longpo.text.documents import find_files, read_documents
from megatron_longpo.text.preprocess import input_files, read_rows
from tests.support.launch import PYTHON, run

SMALL = ReadingConfig(max_row_bytes=1000)


# --------------------------------------------------------------------------------------------------
# Kinds of files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder", "link to a FIFO"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    with pytest.raises(NotRegularFile, match=f"is a {kind.split()[-1]}, not a regular file"):
        open_regular(path)


FIFO_READERS = {
    "x.json": [lambda p: read_manifest(p.with_suffix("")), lambda p: read_squad(p), lambda p: read_hotpotqa(p)],
    "x.jsonl": [lambda p: input_files([str(p)]), lambda p: read_squad(p)],
    "x.txt": [lambda p: find_files([str(p)], "other"), lambda p: read_words(str(p))],
    "x.parquet": [lambda p: find_files([str(p)], "other"), lambda p: input_files([str(p)])],
    "longbook_qa_eng.jsonl": [lambda p: read_task(p.parent, "longbook_qa_eng")],
    "results.json": [lambda p: read_results(p.parent)],
    "test.jsonl": [lambda p: local_data(p.parent)],
    "long.manifest.json": [read_stage_manifest],
}


@pytest.mark.parametrize("name", list(FIFO_READERS))
def test_every_reader_refuses_a_fifo_by_name(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for read in FIFO_READERS[name]:
        with pytest.raises(LongPOError, match="is a FIFO, not a regular file"):
            read(tmp_path / name)  # type: ignore[no-untyped-call]


# --------------------------------------------------------------------------------------------------
# Symbolic links
# --------------------------------------------------------------------------------------------------


def test_links_are_followed_only_inside_their_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret.txt").write_text("root:x:0:0")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text("more")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("a")
    (docs / "b.txt").symlink_to("a.txt")
    (docs / "out.txt").symlink_to(tmp_path / "secret.txt")
    (docs / "relative.txt").symlink_to("../secret.txt")
    (docs / "chain.txt").symlink_to("out.txt")
    (docs / "folder").symlink_to(tmp_path / "elsewhere")
    for name in (str(docs), f"{docs}/*.txt", f"{docs}/**", f"{docs}/**/*.txt"):
        assert [p.name for p, _ in find_files([name], "other")] == ["a.txt"], name
        shown = capfd.readouterr()
        assert "3 symbolic link(s) lead out of the folder" in shown.err + shown.out, name
    followed = find_files([str(docs)], "other", ReadingConfig(follow_symlinks=True))
    assert {p.resolve().name for p, _ in followed} == {"a.txt", "secret.txt"}
    # A file that the user names is read, whatever it is a link to.
    assert find_files([str(docs / "out.txt")], "other")
    (docs / "pairs.jsonl").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match="no file is left"):
        input_files([str(docs)])


def test_a_pattern_gives_each_file_once_whatever_links_lead_back(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(str(number))
    # With two links that lead back, following them would double the files at each of forty levels.
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert len(find_files([f"{tmp_path}/**/*.txt"], "other")) == 9
    assert len(find_files([f"{tmp_path}/**"], "other", ReadingConfig(follow_symlinks=True))) == 9
    assert len(find_files([f"{tmp_path}/**.txt"], "other")) == 9
    assert len(find_files([f"{tmp_path}/[0-4].txt", f"{tmp_path}/?.txt"], "other")) == 9


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_above_the_limit_is_skipped_with_its_number(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps({"text": letter * n}) for letter, n in (("a", 10), ("b", 5000), ("c", 10), ("d", 10**6))]
    content = "\n".join(lines).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    if ending == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if ending else content)
    found = list(read_documents([(path, "other")], "text", SMALL))
    assert [(d.name[-1], d.error) for d in found] == [
        ("1", None), ("2", "document_too_large"), ("3", None), ("4", "document_too_large"),
    ]  # fmt: skip
    if ending != ".zst":
        rows = list(read_rows([path], 0, SMALL))
        assert [row.skipped.reason if row.skipped else None for row in rows] == [None, "row_too_large"] * 2
        assert rows[1].skipped is not None and "5013 bytes; max_row_bytes is 1000" in rows[1].skipped.detail
        assert len(rows[1].text or "") == 1000


def test_lines_at_the_limit_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000 + b"\n" + b"b" * 1001 + b"\n\n" + b"c" * 1000)
    with opened(path) as stream:
        lines = list(read_lines(stream, SMALL))
    assert [(len(line.raw), bool(line.too_long)) for line in lines] == [
        (1001, False), (1000, True), (1, False), (1000, False),
    ]  # fmt: skip


def test_large_text_files_and_cells_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1001)
    table = pyarrow.table({"text": pyarrow.array(["short", "long" * 1000] * 3).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    found = list(read_documents(find_files([str(tmp_path)], "other"), "text", SMALL))
    assert [d.error for d in found] == ["document_too_large", *[None, "document_too_large"] * 3]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_decompression_bomb_costs_a_buffer(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_longpo.runtime.reading.FREE_BYTES", 2**24)
    path = tmp_path / f"bomb.jsonl.{ending}"
    zeros = b"0" * 2**20
    if ending == "gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(200):
                stream.write(zeros)
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            for _ in range(200):
                stream.write(zeros)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"decompresses to more than \d+ bytes, 20 times its size.*raise max_expansion"):
        list(read_documents([(path, "other")], "text", ReadingConfig(max_row_bytes=10**6, max_expansion=20)))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    # As large as it is allowed to be, it is one line that is too long.
    (only,) = read_documents([(path, "other")], "text", ReadingConfig(max_row_bytes=10**6, max_expansion=10**6))
    assert only.error == "document_too_large"


def test_a_parquet_bomb_is_refused_by_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_longpo.runtime.reading.FREE_BYTES", 2**20)
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"id": [1], "text": ["0" * 2**24]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    for read in (lambda: list(read_documents([(path, "other")], "text")), lambda: list(read_rows([path], 0))):
        with pytest.raises(DataError, match=r"row group 0 decompresses to \d+ bytes, more than 200 times"):
            read()
    free = ReadingConfig(max_expansion=10**6)
    assert [d.error for d in read_documents([(path, "other")], "text", free)] == [None]
    (row,) = read_rows([path], 0, ReadingConfig(max_expansion=10**6, max_row_bytes=10**6))
    assert row.skipped is not None and row.skipped.reason == "row_too_large"


def test_files_that_are_read_whole_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(["a" * 1000]))
    with pytest.raises(TooLarge, match="more than 1000 bytes"):
        read_json(path, 1000)
    with pytest.raises(DataError, match="more than 1000 bytes"):
        read_squad(path, ReadingConfig(max_json_bytes=1000))
    # Also where it is small until it is decompressed.
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="more than 1000 bytes"):
        read_hotpotqa(tmp_path / "y.json.gz", ReadingConfig(max_json_bytes=1000))


# --------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------


def test_nesting_of_json_has_a_limit() -> None:
    def nested(levels: int, open_: str = "[", close: str = "]") -> str:
        return open_ * levels + "1" + close * levels

    assert parse_json(nested(MAX_JSON_DEPTH))
    for text in (
        nested(MAX_JSON_DEPTH + 2),
        nested(10**5),
        nested(100, '{"a":', "}"),
        nested(500, '[{"a":', "}]"),
        "[[1], " + nested(90) + "]",
        "[" * 10**6,
    ):
        for form in (text, text.encode()):
            with pytest.raises(ValueError, match=r"nested more than 64 levels|Expecting value"):
                parse_json(form)
    assert parse_json(json.dumps([["["] * 1000] * 100))


def test_the_limit_of_nesting_is_a_setting(tmp_path: Path) -> None:
    from megatron_longpo.errors import ConfigError
    from megatron_longpo.schema import check_ranges
    from megatron_longpo.text.preprocess import Settings, process_row

    deep = "[" * 70 + "1" + "]" * 70
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a"})[:-1] + f', "more": {deep}}}\n')
    assert [d.error for d in read_documents([(path, "other")], "text")] == ["not_json"]
    wider = ReadingConfig(max_json_depth=80)
    assert [d.text for d in read_documents([(path, "other")], "text", wider)] == ["a"]
    (row,) = read_rows([path], 0, wider)
    for limits, reason in ((ReadingConfig(), "not_json"), (wider, "wrong_type")):
        (skipped,) = process_row(row, Settings(vocab_size=9, reading=limits), None).skipped
        assert (skipped.reason == "not_json") == (reason == "not_json")
    for depth in (7, 901):
        with pytest.raises(ConfigError, match=rf"max_json_depth={depth} must be in \[8, 900\]"):
            check_ranges(ReadingConfig(max_json_depth=depth))


@pytest.mark.parametrize("name", ["x.json", "results.json", "long.manifest.json"])
def test_deep_json_is_refused_in_one_line_by_every_reader(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 10**5 + "]" * 10**5)
    for read in FIFO_READERS[name]:
        with pytest.raises(LongPOError, match="nested more than 64 levels"):
            read(tmp_path / name)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [{}, [], 5, None])
@pytest.mark.parametrize("name", ["context", "question", "text", "answer"])
def test_questions_that_are_no_texts_are_refused(tmp_path: Path, value: Any, name: str) -> None:
    path = tmp_path / "x.json"
    texts = {"context": "c", "question": "q", "text": "a", "answer": "a", name: value}
    qa = {"question": texts["question"], "answers": [{"text": texts["text"]}]}
    if name != "answer":
        path.write_text(
            json.dumps({"data": [{"title": "t", "paragraphs": [{"context": texts["context"], "qas": [qa]}]}]})
        )
        with pytest.raises(DataError, match="is not in SQuAD's format"):
            read_squad(path)
    if name in ("question", "answer"):
        row = {"question": texts["question"], "answer": texts["answer"], "context": [["t", ["s"]]]}
        path.write_text(json.dumps([row]))
        with pytest.raises(DataError, match="is not in HotpotQA's format"):
            read_hotpotqa(path)


# --------------------------------------------------------------------------------------------------
# Damaged tables
# --------------------------------------------------------------------------------------------------

DAMAGE = """
import random, sys
from pathlib import Path
from megatron_longpo.errors import DataError
from megatron_longpo.text.documents import read_documents
from megatron_longpo.text.preprocess import read_rows

whole = Path(sys.argv[1])
rng, content, refused = random.Random(3), whole.read_bytes(), 0
for number in range(300):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255))
    path = whole.with_name("damaged" + whole.suffix)
    path.write_bytes(changed)
    try:
        list(read_rows([path], 0))
        if whole.suffix == ".parquet":
            list(read_documents([(path, "other")], "text"))
    except DataError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_damaged_tables_are_refused_and_crash_nothing(tmp_path: Path, ending: str) -> None:
    """In a process of its own: offsets that lead out of a buffer, if they are not checked, end it with a segmentation fault."""
    table = pyarrow.table({"text": ["The tower. " * 9] * 30, "turns": [[{"instruction": "Where?"}] * 3] * 30})
    path = tmp_path / f"rows.{ending}"
    if ending == "arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    done = run([PYTHON, "-c", DAMAGE, str(path)], fresh=True)
    assert int(done.stdout) > 20


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("with_dictionary", [False, True])
def test_compressed_arrow_files_grow_only_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, compression: str, with_dictionary: bool
) -> None:
    """Nothing of what is too large is decompressed."""
    monkeypatch.setattr("megatron_longpo.runtime.arrow.FREE_BYTES", 2**20)

    def write(texts: list[str]) -> Path:
        column: Any = pyarrow.array(texts)
        table = pyarrow.table({"text": column.dictionary_encode() if with_dictionary else column})
        path = tmp_path / "rows.arrow"
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with make(str(path), table.schema, options=options) as writer:
            writer.write_table(table)
        return path

    path = write([f"{n} The tower. " * 5 for n in range(50)])
    assert [row.columns and row.columns["text"][:4] for row in read_rows([path], 0)][:2] == ["0 Th", "1 Th"]
    path = write([f"{n}" + "x" * 2**16 for n in range(300)])
    assert path.stat().st_size < 10**6
    before = pyarrow.total_allocated_bytes()
    pyarrow.default_memory_pool().release_unused()
    with pytest.raises(
        DataError, match=r"batch \d decompresses to 19\d{6} bytes, more than 1 times .* raise max_expansion"
    ):
        list(read_rows([path], 0, ReadingConfig(max_expansion=1)))
    assert pyarrow.total_allocated_bytes() - before < 2**23
    assert sum(1 for _ in read_rows([path], 0, ReadingConfig(max_expansion=10**5))) == 300
    # A size that no memory holds.
    content = path.read_bytes()
    size = struct.pack("<q", 2**16 * 300 + sum(len(str(n)) for n in range(300)))
    assert size in content
    path.write_bytes(content.replace(size, struct.pack("<q", 2**60)))
    with pytest.raises(DataError, match=r"decompresses to [1-9]\d{18} bytes"):
        list(read_rows([path], 0, ReadingConfig(max_expansion=10**5)))
    for cut in (40, 200, len(content) // 2):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            list(read_rows([path], 0))
