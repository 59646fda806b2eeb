"""Damaged checkpoints and hostile models: found, named in one line with the fix, nothing of a stranger's is run.

One tiny model, its converted checkpoint and a run of two saves serve all tests; each damages a copy.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_longpo.checkpoint.checksums import CHECKSUMS, find_damage
from megatron_longpo.checkpoint.folders import folder_of, latest_step, read_progress, resolve
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights, check_model_folder
from megatron_longpo.conversion.export_hf import export_hf
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.engines.transformers_engine import TransformersEngine
from megatron_longpo.errors import CheckpointError, DamagedError, LongPOError
from megatron_longpo.model.shape import ModelShape
from tests.support.data import make_data
from tests.support.launch import ROOT, command, environment, run
from tests.support.models import make_chat_model
from tests.support.tokenizers import TEXT, make_fast_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model ``hf``, its checkpoint ``ckpt``, data, and the folder ``run`` with two saves of two ranks, the last in the
    background."""
    folder = tmp_path_factory.mktemp("faults")
    make_fast_tokenizer(folder / "hf")
    make_chat_model(folder / "hf")
    import_hf(folder / "hf", folder / "ckpt")
    make_data(folder / "data", 4, longest=60)
    run(training(folder, folder / "run", processes=2, train_iters=2, async_save=True))
    return folder


def training(made: Path, output: Path, *, processes: int | None = None, **flags: Any) -> list[str]:
    """Command line of a short run."""
    flags = {"load": made / "ckpt", "train_iters": 3, **flags}
    return command(
        *("train", "--no-tensorboard"),
        processes=processes,
        **{"data_path": made / "data", "save": output, "global_batch_size": 2, "save_interval": 1, "lr": 1e-4, **flags},
    )


def refused(line: list[str], *words: str) -> None:
    """Run a command line that must end in one line on standard error, with exit status 2."""
    done = run(line, expect=2)
    assert_one_line(done.stdout + done.stderr, *words)


def assert_one_line(text: str, *words: str) -> None:
    (error,) = (line for line in text.splitlines() if line.startswith("error:"))
    assert "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in error, error


def flip(path: Path, place: int | None = None, bit: int = 4) -> None:
    """Flip a bit of a file; of a ``.distcp`` by default one in the middle, where weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run/iter_0000001", "run/iter_0000002", "ckpt"])
def test_what_is_written_has_checksums(made: Path, name: str) -> None:
    listed = json.loads((made / name / CHECKSUMS).read_text())["files"]
    written = {path.relative_to(made / name).as_posix() for path in (made / name).rglob("*") if path.is_file()}
    assert set(listed) == written - {CHECKSUMS} and find_damage(made / name) is None
    ranks = {path.name[:4] for path in (made / name).glob("*.distcp")}
    assert ranks == ({"__0_", "__1_"} if "run" in name else {"__0_"})


@pytest.mark.parametrize("name", ["run/iter_0000002", "ckpt"])
def test_a_bit_flipped_at_200_random_places_is_found(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made / name, tmp_path / "copy"))
    rng, files = random.Random(0), files_of(folder)
    # By size, as bits fall; and as often in any file, for the small ones.
    sizes = [path.stat().st_size for path in files]
    for number in range(200):
        path = rng.choices(files, sizes)[0] if number % 2 else rng.choice(files)
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, place, bit)
        found = find_damage(folder)
        assert found is not None, f"{path}, byte {place}, bit {bit}"
        flip(path, place, bit)
    assert find_damage(folder) is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE: list[Callable[[Path], None]] = [Path.unlink, _cut, _empty, _grow, flip]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json", CHECKSUMS])
def test_an_older_checkpoint_is_used_and_the_damaged_one_named(
    made: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(made / "run", tmp_path / "run"))
    newest = folder_of(output, 2)
    damage(newest / name)
    if (name, damage) == (CHECKSUMS, Path.unlink):
        # As an older version writes it.
        assert resolve(output) == newest
        return
    assert resolve(output) == folder_of(output, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "passed over" in line and str(newest) in line and name in line
    if (name, damage) != ("metadata.json", Path.unlink):
        with pytest.raises(DamagedError, match=re.escape(name)):
            read_progress(newest)
        with pytest.raises(DamagedError, match=re.escape(name)):
            resolve(newest)


@pytest.mark.parametrize("name", ["model.json", "run.yaml", "hf/config.json"])
def test_what_only_export_needs_does_not_keep_a_run_from_resuming(made: Path, tmp_path: Path, name: str) -> None:
    output = Path(shutil.copytree(made / "run", tmp_path / "run"))
    flip(folder_of(output, 2) / name)
    assert read_progress(folder_of(output, 2)).step == 2
    assert resolve(output) == folder_of(output, 1)


def test_every_checkpoint_damaged_is_an_error(made: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(made / "run", tmp_path / "run"))
    for step in (1, 2):
        flip(folder_of(output, step) / "__0_0.distcp")
    with pytest.raises(DamagedError, match=r"iter_0000002/__0_0\.distcp: its content differs"):
        resolve(output)


def test_a_flipped_bit_of_a_converted_checkpoint_is_refused_everywhere(made: Path, tmp_path: Path) -> None:
    ckpt = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    flip(ckpt / "__0_0.distcp")
    words = ("__0_0.distcp: its content differs from its checksum", "convert the model again")
    refused(training(made, tmp_path / "run", load=ckpt), *words)
    refused(training(made, tmp_path / "run", reference_load=ckpt), *words)
    refused(command("convert", "export", checkpoint=ckpt, output=tmp_path / "out"), *words)
    refused(command("convert", "verify", checkpoint=ckpt, hf=made / "hf"), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]


def test_a_run_resumes_from_the_newest_good_checkpoint(made: Path, tmp_path: Path) -> None:
    """The newest has a flipped bit, as two ranks find that read it, each a part; one before it has no metadata.json."""
    output = Path(shutil.copytree(made / "run", tmp_path / "run"))
    flip(folder_of(output, 2) / "__1_0.distcp")
    said = run(training(made, output, processes=2, train_iters=2)).stdout
    assert "iter_0000002/__1_0.distcp: its content differs" in said and f"resumed from {folder_of(output, 1)}" in said
    (folder_of(output, 2) / "metadata.json").unlink()
    said = run(training(made, output, train_iters=2)).stdout
    assert "iter_0000002: has no metadata.json" in said and f"resumed from {folder_of(output, 1)}" in said
    assert find_damage(folder_of(output, 2)) is None


def test_damage_of_large_files_is_found_by_a_run(made: Path, tmp_path: Path) -> None:
    """As of files above 16 MiB: of the checkpoint that a run resumes from, of ``load``, and of a reference that is cached."""
    worker = "from megatron_longpo.checkpoint import checksums; checksums._SMALL_BYTES = 0; import runpy, sys; "
    worker += "sys.argv = sys.argv[1:]; runpy.run_module('megatron_longpo.train', run_name='__main__')"

    def line(output: Path, **flags: Any) -> list[str]:
        program, _, _, *rest = training(made, output, **flags)
        return [program, "-c", worker, "train", *rest]

    output = Path(shutil.copytree(made / "run", tmp_path / "run"))
    flip(folder_of(output, 2) / "__0_0.distcp")
    said = run(line(output, train_iters=2)).stdout
    assert "iter_0000002/__0_0.distcp: its content differs" in said and f"resumed from {folder_of(output, 1)}" in said
    # Another run starts from the newest good one, and has it as its reference.
    before = Path(shutil.copytree(made / "run", tmp_path / "before"))
    flip(folder_of(before, 2) / "__1_0.distcp")
    said = run(line(tmp_path / "after", load=before, train_iters=1, objective="dpo")).stdout
    passed_over = [text for text in said.splitlines() if "so that checkpoint is passed over" in text]
    assert len(passed_over) == 1 and "__1_0.distcp: its content differs" in passed_over[0]
    assert f"{folder_of(before, 1)} is used" in passed_over[0]
    damaged = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    flip(damaged / "__0_0.distcp")
    for flags in ({"load": damaged}, {"reference_load": damaged}):
        refused(line(tmp_path / "new", **flags), "__0_0.distcp: its content differs")
    assert latest_step(tmp_path / "new") is None


def test_a_checkpoint_of_an_older_version_is_read(made: Path, tmp_path: Path) -> None:
    ckpt = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    (ckpt / CHECKSUMS).unlink()
    said = run(command("convert", "export", checkpoint=ckpt, output=tmp_path / "out")).stdout
    assert said.count("has no checksums.json") == 1


# --------------------------------------------------------------------------------------------------
# Hostile models
# --------------------------------------------------------------------------------------------------

_EVIL = """
import os
os.mkdir({marker!r})
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig
"""


def changed(made: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model with another config.json; a value of None removes the key."""
    shutil.copytree(made / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture
def evil(made: Path, tmp_path: Path) -> Path:
    """A model that brings code and a model_type of its own; the code makes the folder ``ran``."""
    names = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    folder = changed(made, tmp_path / "evil", model_type="evil", architectures=["EvilForCausalLM"], auto_map=names)
    (folder / "modeling_evil.py").write_text(_EVIL.format(marker=str(tmp_path / "ran")))
    return folder


def answers(made: Path, model: Path, folder: Path) -> list[list[str]]:
    """Command lines of generation and evaluation with a model."""
    (folder / "documents.jsonl").write_text(json.dumps({"text": TEXT * 5}) + "\n")
    pairs = command("generate", documents=folder / "documents.jsonl", output=folder / "pairs.jsonl", model=model)
    preference = command("evaluate", tasks="preference", pairs=made / "data", model=model, output=folder / "evaluation")
    return [pairs, preference]


def test_a_models_code_never_runs_although_standard_input_says_yes(made: Path, evil: Path, tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # Fresh processes: the children of the server have no standard input.
    started = [
        subprocess.Popen(line, env=environment(), cwd=ROOT, text=True, **pipes)
        for line in answers(made, evil, tmp_path)
    ]
    for process in started:
        text, _ = process.communicate("y\n" * 50, timeout=120)
        assert process.returncode == 2, text[-3000:]
        assert_one_line(text, "evil")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_an_unknown_type_is_refused(made: Path, evil: Path, tmp_path: Path) -> None:
    """Also with an architecture that is known, and where it was imported before it was refused."""
    known = changed(made, tmp_path / "known", model_type="evil")
    for model in (evil, known):
        refused(command("convert", "import", hf=model, output=tmp_path / "new"), "model_type='evil' is unknown")
        refused(command("convert", "verify", checkpoint=made / "ckpt", hf=model), "model_type='evil' is unknown")
    ckpt = Path(shutil.copytree(made / "ckpt", tmp_path / "ckpt"))
    (ckpt / CHECKSUMS).unlink()
    shutil.copy(evil / "config.json", ckpt / "hf" / "config.json")
    refused(command("convert", "export", checkpoint=ckpt, output=tmp_path / "new"), "model_type='evil' is unknown")
    assert not (tmp_path / "new").exists() and not (tmp_path / "ran").exists()


def test_an_export_passes_on_neither_code_nor_auto_map(made: Path, tmp_path: Path) -> None:
    """A model of a known type may name code that its own transformers would run, as YaRN-Mistral does; it is left out."""
    names = {"AutoConfig": "modeling_evil.EvilConfig"}
    model = changed(made, tmp_path / "hf", auto_map=names)
    for name in ("tokenizer_config.json", "generation_config.json"):
        content = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps({**content, "auto_map": names}))
    for name in ("modeling_evil.py", "evil.pyc", "evil.so", "evil.pkl", "training_args.bin", "evil.npy", ".evil"):
        (model / name).write_text("evil")
    import_hf(model, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"} <= kept
    assert not {name for name in kept if "evil" in name or name == "training_args.bin"}
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text() and "modeling_evil" not in path.read_text()


class _Hostile:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def is_one_line(caught: pytest.ExceptionInfo[LongPOError]) -> bool:
    return "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("how", ["zip", "raw", "tar", "not a pickle", "cut"])
def test_pickled_weights_that_are_not_weights_are_refused(made: Path, tmp_path: Path, how: str) -> None:
    model = changed(made, tmp_path / "hf")
    path = model / "pytorch_model.bin"
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if how == "zip":
        torch.save({**weights, "evil": _Hostile(tmp_path / "ran")}, path)
    elif how == "raw":
        path.write_bytes(pickle.dumps({"evil": _Hostile(tmp_path / "ran")}))
    elif how == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(model / "config.json", "pickle")
    else:
        torch.save(weights, path)
        path.write_bytes(b"evil" if how == "not a pickle" else path.read_bytes()[:-300])
    for load in (lambda: import_hf(model, tmp_path / "new"), lambda: TransformersEngine(model)):
        with pytest.raises(LongPOError) as caught:
            load()
        assert is_one_line(caught) and str(model) in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


NESTED = "[" * 300_000
CONFIGS: dict[str, dict[str, Any] | str] = {
    "nested": NESTED,
    "nested value": '{"a": ' + NESTED + "}",
    "a list": "[]",
    "empty": "",
    "invalid UTF-8": "\udcff",
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -4},
    "more heads than channels": {"num_attention_heads": 64, "num_key_value_heads": 64},
    "heads not divided": {"num_key_value_heads": 3},
    "no key-value heads": {"num_key_value_heads": 0},
    "layers": {"num_hidden_layers": 10**9},
    "layers within the limit": {"num_hidden_layers": 4000, "hidden_size": 2**18, "intermediate_size": 2**20},
    "half a layer": {"num_hidden_layers": 1.5},
    "layers as text": {"num_hidden_layers": "2"},
    "width": {"hidden_size": 2**60},
    "digits": {"hidden_size": 10**4000},
    "more digits": '{"hidden_size": 1' + "0" * 100_000 + "}",
    "infinite width": '{"model_type": "llama", "intermediate_size": 1e999}',
    "NaN": '{"model_type": "llama", "vocab_size": NaN}',
    "vocabulary": {"vocab_size": 10**12},
    "positions": {"max_position_embeddings": 10**18},
    "head size": {"head_dim": 2**40},
}


def _write_config(folder: Path, content: dict[str, Any] | str) -> None:
    path = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content, errors="surrogateescape")


@pytest.fixture(scope="module")
def writable(made: Path) -> Path:
    """A copy of the model whose config.json tests replace."""
    return Path(shutil.copytree(made / "hf", made / "writable"))


@pytest.mark.parametrize("name", CONFIGS)
def test_absurd_configurations_are_refused_before_memory_is_taken(
    made: Path, writable: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(made / "hf" / "config.json", writable / "config.json")
    sys.set_int_max_str_digits(0)
    _write_config(writable, CONFIGS[name])
    sys.set_int_max_str_digits(4300)
    before = psutil.Process().memory_info().rss
    loads = [lambda: import_hf(writable, tmp_path / "new")]
    # transformers itself knows nothing of groups; that its model is another than the weights shows later.
    if name not in ("heads not divided", "more heads than channels"):
        loads.append(lambda: check_model_folder(writable))
    for load in loads:
        with pytest.raises(CheckpointError) as caught:
            load()
        assert is_one_line(caught) and "config.json" in str(caught.value)
    assert psutil.Process().memory_info().rss - before < 2**28 and not (tmp_path / "new").exists()


SHAPES: dict[str, dict[str, Any]] = {
    "layers": {"num_layers": 10**9},
    "layers within the limit": {"num_layers": 4000, "ffn_hidden_size": 2**20},
    "no heads": {"num_attention_heads": 0},
    "heads not divided": {"num_query_groups": 3},
    "negative vocabulary": {"vocab_size": -1},
    "infinite base": {"rotary_base": float("inf")},
    "no window": {"window_size": 0},
}


@pytest.mark.parametrize("name", SHAPES)
def test_absurd_shapes_of_a_checkpoint_are_refused(made: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "ckpt").mkdir()
    os.link(made / "ckpt" / "__0_0.distcp", tmp_path / "ckpt" / "__0_0.distcp")
    content = {**json.loads((made / "ckpt" / "model.json").read_text()), **SHAPES[name]}
    (tmp_path / "ckpt" / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.json: ") as caught:
        ModelShape.read(tmp_path / "ckpt")
    assert is_one_line(caught)


def _header(length: int, header: str) -> bytes:
    return struct.pack("<Q", length) + header.encode()


def _whole(header: dict[str, Any] | str) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return _header(len(text), text)


HEADERS: dict[str, bytes] = {
    "length": _header(2**60, "{}"),
    "largest length": _header(2**64 - 1, "{}"),
    "no length": b"\0\0",
    "empty": b"",
    "shape": _whole({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}),
    "overflowing shape": _whole({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    "offsets outside": _whole({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}),
    "offsets backwards": _whole({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
    "nested": _whole(NESTED),
    "dtype": _whole({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read") as caught:
        HuggingFaceWeights(tmp_path)
    assert is_one_line(caught)


@pytest.mark.parametrize(
    "file", ["../../../../etc/passwd", "/etc/passwd", "..", "a/b.safetensors", "", "a\0b", 7, None, ["x"]]
)
def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, file: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"index\.json: (names|cannot be read)") as caught:
        HuggingFaceWeights(tmp_path)
    assert is_one_line(caught)


@pytest.mark.parametrize("content", [NESTED, '{"weight_map": ' + NESTED, '{"weight_map": [1]}', "[]", ""])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read") as caught:
        HuggingFaceWeights(tmp_path)
    assert is_one_line(caught)
