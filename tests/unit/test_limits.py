"""Limits that have a setting: what is beyond them is refused or skipped by name, and the setting allows it."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_longpo.checkpoint import huggingface
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights, check_model_folder, read_hf_config
from megatron_longpo.config import read_yaml
from megatron_longpo.errors import CheckpointError, ConfigError, DataError
from megatron_longpo.evaluation.suites.short_context import local_data
from megatron_longpo.model.shape import allow_model_sizes
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.parquet import check_pages
from megatron_longpo.runtime.reading import ReadingConfig, TooLarge, WrongFormat, check_expansion
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.documents import read_documents
from megatron_longpo.text.preprocess import RawRow, Settings, process_row, read_rows
from tests.support.data import text_row
from tests.support.models import make_model
from tests.support.tokenizers import make_fast_tokenizer


@pytest.fixture
def factor() -> Iterator[Any]:
    yield allow_model_sizes
    allow_model_sizes(1.0)


def test_files_of_a_model_may_be_larger_by_the_factor(
    tmp_path: Path, factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", tmp_path / "hf", num_hidden_layers=1)
    monkeypatch.setattr(huggingface, "MAX_CONFIG_BYTES", (model / "config.json").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"config.json: it has more than \d+ bytes.*raise model_size_factor"):
        read_hf_config(model)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    monkeypatch.setattr(huggingface, "MAX_INDEX_BYTES", 5)
    with pytest.raises(CheckpointError, match=r"index.json: it has more than 5 bytes.*raise model_size_factor"):
        HuggingFaceWeights(model)
    factor(10)
    assert read_hf_config(model)["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"beside model\.safetensors"):
        HuggingFaceWeights(model)


def test_a_model_may_describe_more_weights_by_the_factor(tmp_path: Path, factor: Any) -> None:
    model = make_model("llama", tmp_path / "hf", num_hidden_layers=1)
    content = json.loads((model / "config.json").read_text())
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    content["vocab_size"] = 5 * stored // content["hidden_size"]
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"describes at least .* raise model_size_factor"):
        check_model_folder(model)
    factor(2)
    check_model_folder(model)


def test_a_template_may_be_a_part_of_its_memory(tmp_path: Path) -> None:
    make_fast_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}{# " + "x" * 2**20 + " #}")
    with pytest.raises(DataError, match=r"more than 1048576 bytes.*raise template_memory_bytes=2147483648"):
        load_tokenizer(tmp_path / "tokenizer", str(path))
    assert load_tokenizer(tmp_path / "tokenizer", str(path), template_memory_bytes=2**32).template.startswith("{{")


def test_turns_that_are_rendered_by_all_earlier_ones_have_a_setting(tmp_path: Path) -> None:
    # Counts the messages before each one, so no turn is rendered without the others.
    template = "{% for m in messages %}<|im_start|>{{ loop.index }}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{{ messages | length + 1 }}assistant {% endif %}"
    (tmp_path / "template").write_text(template)
    make_fast_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", str(tmp_path / "template"))
    row = RawRow(line=1, text=json.dumps(text_row(turns=20)), columns={}, skipped=None)
    (skipped,) = process_row(row, Settings(max_turns_rendered_whole=19), tokenizer).skipped
    assert skipped.reason == "too_many_turns" and "max_turns_rendered_whole is 19" in skipped.detail
    assert process_row(row, Settings(max_turns_rendered_whole=20), tokenizer).sample is not None


def test_own_files_have_a_limit_that_the_environment_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_checked(path, {"text": "x" * 1000})
    monkeypatch.setenv("MEGATRON_LONGPO_MAX_JSON_BYTES", "1000")
    with pytest.raises(TooLarge, match=r"more than 1000 bytes.*MEGATRON_LONGPO_MAX_JSON_BYTES may raise it"):
        read_checked(path)
    monkeypatch.setenv("MEGATRON_LONGPO_MAX_JSON_BYTES", "2000")
    assert read_checked(path) == {"text": "x" * 1000}
    for text in ("x", "-1", "0", "1e9"):
        monkeypatch.setenv("MEGATRON_LONGPO_MAX_JSON_BYTES", text)
        with pytest.raises(ConfigError, match="must be a number of bytes"):
            read_checked(path)


@pytest.mark.parametrize("name", ["/dev/zero", "large.yaml"])
def test_a_configuration_is_small(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not path.exists():
        path.write_bytes(b"#" * (2**24 + 1))
    with pytest.raises(ConfigError, match="has more than 16777216 bytes"):
        read_yaml(path)


# --------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------


def _varint(value: int, length: int) -> bytes:
    """A number as Thrift's compact protocol writes it, padded to a length."""
    value *= 2
    digits = [(value >> (7 * n)) & 127 for n in range(length)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def write_lying_bomb(path: Path, size: int) -> Path:
    """A parquet file of a page of ``size`` zeros, whose footer says that it has a thousand bytes."""
    table = pyarrow.table({"text": ["0" * size]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    claimed = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    length = next(n for n in itertools.count(1) if claimed * 2 < 128**n)
    assert content.count(_varint(claimed, length)) >= 2
    path.write_bytes(content.replace(_varint(claimed, length), _varint(1000, length)))
    return path


def test_pages_that_are_larger_than_the_footer_says_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reading", "parquet"):
        monkeypatch.setattr(f"megatron_longpo.runtime.{module}.FREE_BYTES", 2**20)
    path = write_lying_bomb(tmp_path / "bomb.parquet", 2**24)
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    assert metadata.row_group(0).total_byte_size == 1000
    check_expansion(metadata, path.stat().st_size)
    (tmp_path / "winogrande" / "train").mkdir(parents=True)
    split = tmp_path / "winogrande" / "train.parquet"
    split.write_bytes(path.read_bytes())
    for read in (
        lambda: list(read_documents([(path, "other")], "text")),
        lambda: list(read_rows([path], 0)),
        lambda: local_data(tmp_path / "winogrande"),
    ):
        with pytest.raises(DataError, match=r"the pages of row group 0 decompress to more than .* raise max_expansion"):
            read()
    check_pages(path, ReadingConfig(max_expansion=10**6))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_of_ordinary_files_are_counted(tmp_path: Path, compression: str, version: str) -> None:
    rows = {"n": list(range(3000)), "text": [f"row {n}" * 9 for n in range(3000)], "none": [None] * 3000}
    rows |= {"list": [[1, 2, 3]] * 3000, "switch": [True] * 3000, "object": [{"a": 1, "b": "x"}] * 3000}
    for dictionary, index in itertools.product((False, True), repeat=2):
        path = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table(rows), path, compression=compression, data_page_version=version, use_dictionary=dictionary,
            row_group_size=700, write_page_index=index, write_page_checksum=index, data_page_size=4096,
        )  # fmt: skip
        check_pages(path)
        # Not one page less than there are.
        metadata = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("megatron_longpo.runtime.parquet.FREE_BYTES", metadata.total_byte_size // 2)
            with pytest.raises(TooLarge, match="row group 0"):
                check_pages(path, ReadingConfig(max_expansion=0))


def test_a_damaged_footer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3]}), path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-1], whole[:20], whole[:-4] + b"PAR2", b"\xff" * 200 + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(WrongFormat, match="is not a whole parquet file"):
            check_pages(path)


# --------------------------------------------------------------------------------------------------
# Local short-context data
# --------------------------------------------------------------------------------------------------


def test_short_context_data_are_what_their_names_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package datasets unpacks whatever is packed, by its content, to any size on the disk."""
    path = tmp_path / "train.jsonl"
    for content in (gzip.compress(b'{"a": 1}\n' * 1000), b"\x28\xb5\x2f\xfd" + b"0" * 100, b"BZh91AY&SY" + b"0" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train.jsonl: cannot be read \(it is packed \(.*unpack it"):
            local_data(tmp_path)
    path.unlink()
    (tmp_path / "train.json").write_text(json.dumps([{"a": 1}] * 100))
    with pytest.raises(DataError, match="max_json_bytes is 100"):
        local_data(tmp_path, ReadingConfig(max_json_bytes=100))
    assert local_data(tmp_path) is not None
    (tmp_path / "train.json").unlink()
    monkeypatch.setattr("megatron_longpo.runtime.arrow.FREE_BYTES", 2**20)
    table = pyarrow.table({"text": ["0" * 2**24]})
    (tmp_path / "train").mkdir()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(str(tmp_path / "train" / "data.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"batch \d decompresses to"):
        local_data(tmp_path)
