"""Checksums of an exported model: written by the export, checked by whatever loads the model again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.checksums import CHECKSUMS, read_checksums
from megatron_longpo.conversion.export_hf import export_hf
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.engines.transformers_engine import TransformersEngine
from megatron_longpo.errors import DamagedError, LongPOError
from megatron_longpo.text.chat import load_tokenizer
from tests.support.models import make_chat_model
from tests.support.tokenizers import make_fast_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    make_fast_tokenizer(folder / "hf")
    make_chat_model(folder / "hf")
    import_hf(folder / "hf", folder / "ckpt")
    export_hf(folder / "ckpt", folder / "out", max_shard_bytes=300_000)
    return folder / "out"


def flip(path: Path) -> Callable[[], object]:
    """Flip a bit in the middle of a file; what is returned puts it back."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    return lambda: path.write_bytes(whole)


def test_every_file_is_listed_but_the_card(exported: Path) -> None:
    shards = [path.name for path in exported.glob("*.safetensors")]
    assert len(shards) > 1
    written = {path.name for path in exported.iterdir()}
    assert set(read_checksums(exported)) == written - {CHECKSUMS, "README.md"}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("file", ["model-00001-of-*.safetensors", "tokenizer.json", "config.json"])
def test_damage_is_named_by_whatever_loads_the_model(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, size: str
) -> None:
    if size == "large":
        monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
    (path,) = exported.glob(file)
    loads: list[Callable[[], Any]] = [
        lambda: TransformersEngine(exported),
        lambda: import_hf(exported, tmp_path / "new"),
    ]
    if size == "small" and file == "tokenizer.json":
        loads.append(lambda: load_tokenizer(exported))
    repair = flip(path)
    try:
        for load in loads:
            with pytest.raises(LongPOError) as caught:
                load()
            # JSON that is none any more is named before it is compared.
            if file.startswith("model"):
                assert isinstance(caught.value, DamagedError) and f"{path}: its content differs" in str(caught.value)
            assert str(exported) in str(caught.value)
        assert not (tmp_path / "new").exists()
    finally:
        repair()
    TransformersEngine(exported)


def test_what_is_changed_on_purpose_is_taken_without_checksums(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 4096}))
    with pytest.raises(DamagedError, match=r"if it was changed on purpose, remove checksums\.json"):
        TransformersEngine(folder)
    (folder / CHECKSUMS).unlink()
    TransformersEngine(folder)
    # The tokenizer alone may be elsewhere; only what is there is compared.
    for path in exported.glob("*.safetensors"):
        (folder / path.name).unlink()
    (folder / CHECKSUMS).write_bytes((exported / CHECKSUMS).read_bytes())
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    load_tokenizer(folder)
    # What is imported from an export does not carry its checksums along.
    import_hf(exported, tmp_path / "again")
    assert not (tmp_path / "again" / "hf" / CHECKSUMS).exists()
