"""Files that were made to do harm, and disks that are full: no code runs, no name makes a path, nothing stays half-written."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.checkpoint.checksums import CHECKSUMS, write_checksums
from megatron_longpo.checkpoint.distributed import DistributedReader
from megatron_longpo.checkpoint.folders import read_progress
from megatron_longpo.config import Config, from_yaml
from megatron_longpo.conversion.changes import NO_CHANGES
from megatron_longpo.conversion.export_hf import export_hf
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.conversion.verify import verify
from megatron_longpo.data.indexed import PreferenceData
from megatron_longpo.errors import CheckpointError, ConfigError, DataError, LongPOError
from megatron_longpo.evaluation.settings import EvaluationConfig
from megatron_longpo.evolution.settings import read_evolution
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import Stage
from megatron_longpo.runtime.failure import explain
from megatron_longpo.text.chat import load_tokenizer
from megatron_longpo.text.documents import find_files, read_documents
from megatron_longpo.text.preprocess import Settings, preprocess
from megatron_longpo.training.checkpointer import _load
from tests.support.data import tokenised_row, write_lines
from tests.support.models import make_model
from tests.support.tokenizers import TEXT, make_fast_tokenizer


class _Hostile:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model ``hf`` and its checkpoint ``ckpt``."""
    folder = tmp_path_factory.mktemp("hostile")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_model("llama", folder / "hf", num_key_value_heads=1, **sizes)
    import_hf(folder / "hf", folder / "ckpt")
    return folder


# --------------------------------------------------------------------------------------------------
# Code
# --------------------------------------------------------------------------------------------------

# Readers of a checkpoint, as the commands call them.
CHECKPOINT_READERS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda ckpt, _: _load({}, ckpt),
    "resume": lambda ckpt, _: (read_progress(ckpt), _load({}, ckpt)),
    "export": lambda ckpt, made: export_hf(ckpt, made / "never"),
    "verify": lambda ckpt, made: verify(ckpt, made / "hf", changes=NO_CHANGES),
    "simulate, plan": lambda ckpt, _: DistributedReader(ckpt),
}


@pytest.mark.parametrize("reader", CHECKPOINT_READERS)
@pytest.mark.parametrize("how", ["checksums that fit", "no checksums"])
def test_the_index_of_a_checkpoint_runs_no_code(made: Path, tmp_path: Path, reader: str, how: str) -> None:
    ckpt = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    (ckpt / ".metadata").write_bytes(pickle.dumps(_Hostile(tmp_path / "ran")))
    (ckpt / CHECKSUMS).unlink()
    if how == "checksums that fit":
        write_checksums(ckpt)
    with pytest.raises(CheckpointError) as caught:
        CHECKPOINT_READERS[reader](ckpt, made)
    assert "\n" not in str(caught.value) and str(ckpt) in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (made / "never").exists()


@pytest.mark.parametrize("reader", ["load", "resume"])
def test_other_pickles_of_a_checkpoint_run_no_code(made: Path, tmp_path: Path, reader: str) -> None:
    ckpt = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    (ckpt / "common.pt").write_bytes(pickle.dumps({"progress": _Hostile(tmp_path / "ran")}))
    (ckpt / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError) as caught:
        CHECKPOINT_READERS[reader](ckpt, made)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_tokenizers_code_does_not_run_although_standard_input_says_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_fast_tokenizer(tmp_path / "tokenizer")
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass EvilTokenizer: pass\n"
    (folder / "tokenization_evil.py").write_text(code)
    path = folder / "tokenizer_config.json"
    names = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    content = {**json.loads(path.read_text()), "tokenizer_class": "EvilTokenizer", "auto_map": names}
    path.write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    try:
        load_tokenizer(folder)
    except LongPOError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "ran").exists()


BOMBS = {
    "object": "a: !!python/object/apply:os.mkdir ['{marker}']",
    "name": "a: !!python/name:os.system",
    "module": "!!python/module:os",
    "aliases": "a: &a [x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a'] * 9)}]\n" for n in range(5)),
    "alias to itself": "&a [*a]",
    "nested": "[" * 2_000,
    "nested mapping": "{a: " * 5_000,
    "a date": "checkpoint: {load: 2026-99-99}",
    "binary": "checkpoint: {load: !!binary gIGC}",
    "a list": "- a",
    "two documents": "a: 1\n---\nb: 2",
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_configuration_is_only_settings(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BOMBS[kind].replace("{marker}", str(tmp_path / "ran")), errors="surrogateescape")
    readers: list[Callable[[], Any]] = [
        lambda: from_yaml(path, Config),
        lambda: from_yaml(path, GenerationConfig),
        lambda: from_yaml(path, EvaluationConfig),
        lambda: read_evolution(path),
    ]
    for read in readers:
        with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------

NAMES = ("../../evil", "/etc/evil", "a/b", "..", "~/evil", "a\0b", "a\nb\x1b[31m", "CON", "x" * 5000, "\u202eb")


def test_ids_of_rows_make_no_paths(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rows = [{**tokenised_row(), "id": name} for name in NAMES] + [
        {**tokenised_row(), "id": value} for value in (7, [1])
    ]
    path = write_lines(source / "rows.jsonl", [json.dumps(row) for row in rows])
    (tmp_path / "out").mkdir()
    preprocess([str(path)], tmp_path / "out" / "data", Settings(vocab_size=101, keep_duplicates=True))
    assert len(PreferenceData(tmp_path / "out" / "data")) >= len(NAMES)
    found = {p.name for p in tmp_path.rglob("*")}
    assert found == {"in", "rows.jsonl", "out", *(f"data.{end}" for end in ("bin", "idx", "json", "rejects.jsonl"))}


def test_a_link_in_a_model_folder_is_named(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its content would travel with every export. Links of the hub's cache, and within the folder, are as they should be."""
    secret = tmp_path / "id_rsa"
    secret.write_text("a secret")
    model = Path(shutil.copytree(made / "hf", tmp_path / "models--a--b" / "snapshots" / "0123"))
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (model / "generation_config.json").replace(blobs / "4567")
    (model / "generation_config.json").symlink_to("../../blobs/4567")
    (model / "also.json").symlink_to("config.json")
    (model / "README.md").symlink_to(secret)
    import_hf(model, tmp_path / "ckpt")
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "is a link to" in line]
    assert len(said) == 1 and f"{model / 'README.md'} is a link to {secret}" in said[0]


def test_documents_with_odd_names_are_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(tmp_path / "texts")
    os.mkdir(folder)
    for name in (b"a\nb.txt", b"\x1b[31mred.txt", b"\xff\xfe.txt", b"-rf.txt", b" .txt", b"$(x);`y`.txt", b"%s{0}.txt"):
        with open(os.path.join(folder, name), "w") as stream:
            stream.write(TEXT)
    found = list(read_documents(find_files([str(tmp_path / "texts")], "auto"), "text"))
    assert len(found) == 7 and not any(document.error for document in found)
    assert "\x1b" not in "".join(capfd.readouterr())
    for document in found:
        json.dumps(document.name).encode("utf-8", errors="strict")


# --------------------------------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------------------------------


@contextmanager
def no_room(most: int) -> Iterator[None]:
    """Files of this process may not become larger: like a full disk, a write fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _explained(error: BaseException) -> str:
    line = str(error) if isinstance(error, LongPOError) else explain(error)
    assert line is not None and "\n" not in line
    return line


def test_preprocessing_without_room_is_named_and_goes_on_with_room(tmp_path: Path) -> None:
    row = {**tokenised_row(), "chosen_input_ids": [1, 2, 3, 4] * 500, "rejected_input_ids": [1, 2, 3, 5] * 500}
    for side in ("chosen", "rejected"):
        row[f"{side}_attention_mask"] = [1] * 2000
        row[f"{side}_labels"] = [-100] * 1999 + [4 if side == "chosen" else 5]
    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for _ in range(20)])
    settings = Settings(vocab_size=101, keep_duplicates=True)
    with no_room(40_000), pytest.raises((OSError, LongPOError)) as caught:
        preprocess([str(path)], tmp_path / "data", settings)
    assert "file too large" in _explained(caught.value) or "File too large" in _explained(caught.value)
    assert not (tmp_path / "data.json").exists()
    assert preprocess([str(path)], tmp_path / "data", settings).samples == 20
    assert len(PreferenceData(tmp_path / "data")) == 20


def test_a_stage_without_room_is_named_and_goes_on_with_room(tmp_path: Path) -> None:
    lines = [{"number": n, "part": 0, "text": "x" * 1000} for n in range(40)]
    with no_room(20_000), pytest.raises(OSError) as caught, Stage(tmp_path, "documents", {}) as stage:
        stage.append(lines)
    assert "file too large" in _explained(caught.value)
    resumed = Stage(tmp_path, "documents", {})
    assert 0 < resumed.records < 40
    with resumed:
        resumed.append(lines[resumed.records :])
    resumed.finish()
    assert Stage(tmp_path, "documents", {}).records == 40


@pytest.mark.parametrize("what", ["import", "export"])
def test_a_conversion_without_room_leaves_nothing(made: Path, tmp_path: Path, what: str) -> None:
    convert = {
        "import": lambda: import_hf(made / "hf", tmp_path / "out"),
        "export": lambda: export_hf(made / "ckpt", tmp_path / "out"),
    }[what]
    with no_room(4_000), pytest.raises(CheckpointError) as caught:
        convert()
    assert "free space" in str(caught.value) or "ulimit -f" in str(caught.value)
    assert not list(tmp_path.iterdir())
    convert()
    assert (tmp_path / "out").is_dir()


def test_what_is_not_a_disks_fault_is_not_explained_as_one() -> None:
    assert explain(ValueError("no")) is None and explain(DataError("no")) is None
    assert "read-only file system; mount" in str(explain(OSError(30, "Read-only file system", "/x")))
    assert "quota" in str(explain(OSError(122, "Disk quota exceeded", "/x")))
