"""Model folders as users bring them: what the config does not tell of, what lies beside the weights, and what must come along."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.conversion.logits import compare_logits
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.attention import AttentionPlan
from megatron_longpo.model.families import FAMILIES
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.hub import model_folder
from tests.support.hub import COMMIT, hub
from tests.support.launch import command, environment, run
from tests.support.models import make_model
from tests.support.tokenizers import make_fast_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mistral"):
        make_model(family, folder / family)
    return folder


@pytest.fixture
def hf(models: Path, tmp_path: Path) -> Path:
    """A Llama whose output layer is its embedding."""
    return Path(shutil.copytree(models / "llama", tmp_path / "hf"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def put(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors, or replace them; ``__`` in a name stands for a dot."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({**load_file(path), **named}, path, {"format": "pt"})


HEAD, BIAS = torch.randn(101, 48, generator=torch.Generator().manual_seed(0)), torch.zeros(48)


@pytest.mark.parametrize(
    ("bring", "message"),
    [
        (
            lambda f: put(f, lm_head__weight=HEAD),
            "lm_head.weight is not model.embed_tokens.weight; set tie_word_embeddings",
        ),
        (lambda f: put(f, lm_head__weight=HEAD[:50].contiguous()), "lm_head.weight is not model.embed_tokens.weight"),
        (lambda f: change(f, tie_word_embeddings=False), "lm_head.weight.*set tie_word_embeddings to true"),
        (lambda f: put(f, score__weight=HEAD), "unknown .'score.weight'"),
        (lambda f: put(f, lm_head__bias=torch.zeros(101)), "unknown .'lm_head.bias'"),
        (
            lambda f: put(f, model__layers__1__self_attn__o_proj__bias=BIAS),
            "unknown .'model.layers.1.self_attn.o_proj.bias'",
        ),
        (lambda f: put(f, model__layers__4__mlp__up_proj__weight=HEAD), "unknown .'model.layers.4.mlp.up_proj.weight'"),
        (lambda f: put(f, model__norm__weight=BIAS.to(torch.float8_e4m3fn)), "model.norm.weight has dtype"),
        (lambda f: change(f, attention_bias=True), "attention_bias=True is not supported"),
        (lambda f: change(f, quantization_config={"quant_method": "gptq"}), "has a quantization_config"),
        (lambda f: change(f, transformers_weights="other.safetensors"), "transformers_weights='other.safetensors'"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}'),
            "an adapter of some/base lies beside a whole model",
        ),
        (
            lambda f: (
                (f / "adapter_config.json").write_text("{}"),
                (f / "model.safetensors").rename(f / "adapter_model.safetensors"),
            ),
            "the folder is an adapter, not a model; merge it first",
        ),
        (
            lambda f: (
                shutil.copy(f / "model.safetensors", f / "model-00001-of-00001.safetensors"),
                (f / "model.safetensors.index.json").write_text(
                    json.dumps(
                        {
                            "weight_map": dict.fromkeys(
                                load_file(f / "model.safetensors"), "model-00001-of-00001.safetensors"
                            )
                        }
                    )
                ),
            ),
            "contains model.safetensors beside model.safetensors.index.json",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_readers_would_take_for_different_models_is_refused(
    hf: Path, tmp_path: Path, bring: Callable[[Path], object], message: str, dtype: str | None
) -> None:
    bring(hf)
    with pytest.raises(CheckpointError, match=message):
        import_hf(hf, tmp_path / "ckpt", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_copy_of_the_embedding_may_lie_in_the_file(hf: Path, tmp_path: Path) -> None:
    """Pickles always hold both; transformers ties them."""
    put(hf, lm_head__weight=load_file(hf / "model.safetensors")["model.embed_tokens.weight"].clone())
    said = run(command("convert", "import", hf=hf, output=tmp_path / "ckpt")).stdout
    assert "compared bit by bit" in said and "logits of 64 tokens" in said
    assert not ModelShape.read(tmp_path / "ckpt").untie_embeddings_and_output_weights


def test_import_compares_with_its_source_before_the_checkpoint_gets_its_name(hf: Path, tmp_path: Path) -> None:
    said = run(command("convert", "import", hf=hf, output=tmp_path / "one", no_verify=True)).stdout
    assert "verify" not in said and (tmp_path / "one").is_dir()

    def refuse(written: Path, source: Path) -> None:
        assert written.is_dir() and ModelShape.read(written).num_layers == 4 and source == hf
        raise CheckpointError("they differ")

    with pytest.raises(CheckpointError, match="they differ"):
        import_hf(hf, tmp_path / "two", check=refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "one"]


def test_a_tokenizer_with_more_ids_than_the_model_is_noted(hf: Path, tmp_path: Path) -> None:
    """The tests' tokenizer has 352 ids, the model 101."""
    make_fast_tokenizer(hf)
    said = run(command("convert", "import", hf=hf, output=tmp_path / "ckpt", no_verify=True)).stdout
    assert "its tokenizer has ids up to 351, but the model has vocab_size=101" in said


def test_an_export_holds_nothing_that_leads_loaders_elsewhere(hf: Path, tmp_path: Path) -> None:
    """Also where an earlier version took such files along at import."""
    (hf / "tokenizer_config.json").write_text("{}")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    import_hf(hf, tmp_path / "ckpt")
    assets = tmp_path / "ckpt" / "hf"
    astray = {
        *("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json"),
        *("adapter_model.safetensors", "pytorch_model.bin", "consolidated.safetensors.index.json", "modules.json"),
        *("model.safetensors.index.json", "modeling_own.py", "training_args.bin"),
    }
    for name in astray:
        (assets / name).write_text("{}")
    change(assets, quantization_config={"quant_method": "gptq"}, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (tmp_path / "ckpt" / "checksums.json").unlink()
    said = run(command("convert", "export", checkpoint=tmp_path / "ckpt", output=tmp_path / "back")).stdout
    assert sorted(str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")) == [
        "additional_chat_templates",
        "additional_chat_templates/tool_use.jinja",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    assert "left out: adapter_config.json" in said


def test_a_missing_sliding_window_is_the_familys(models: Path, tmp_path: Path) -> None:
    """transformers takes 4096; a checkpoint without a window is not that model, whatever length is compared."""
    hf = Path(shutil.copytree(models / "mistral", tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    del config["sliding_window"]
    (hf / "config.json").write_text(json.dumps(config))
    import_hf(hf, tmp_path / "ckpt")
    shape = ModelShape.read(tmp_path / "ckpt")
    assert shape.window_size == 4096
    # As an earlier version imported it.
    shape.replace(window_size=None).write(tmp_path / "ckpt")
    (tmp_path / "ckpt" / "checksums.json").unlink()
    done = run(command("convert", "verify", checkpoint=tmp_path / "ckpt", hf=hf), expect=2)
    assert "window_size: model.json has None, config.json 4096" in done.stdout


def in_hub_cache(hf: Path, folder: Path) -> Path:
    """The folder as a hub's cache holds it: links to blobs in a snapshot."""
    snapshot = folder / "models--org--name" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (folder / "models--org--name" / "blobs").mkdir()
    for number, path in enumerate(sorted(hf.iterdir())):
        shutil.copy(path, folder / "models--org--name" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return snapshot


@pytest.mark.parametrize("written", [None, "its/parent"])
def test_a_model_of_the_hubs_cache_has_its_name_and_revision(hf: Path, tmp_path: Path, written: str | None) -> None:
    if written:
        change(hf, _name_or_path=written)
    snapshot = in_hub_cache(hf, tmp_path / "hub")
    import_hf(snapshot, tmp_path / "ckpt")
    shape = ModelShape.read(tmp_path / "ckpt")
    assert (shape.base_model, shape.base_revision) == ("org/name", "0123456789abcdef")
    # By a link to it as well.
    (tmp_path / "link").symlink_to(snapshot)
    import_hf(tmp_path / "link", tmp_path / "second")
    assert ModelShape.read(tmp_path / "second") == shape


@pytest.mark.parametrize(
    ("written", "name"),
    [("org/name", "org/name"), ("/home/somebody/org/name", "hf"), ("./out", "hf"), ("", "hf"), (7, "hf")],
)
def test_a_path_on_somebodys_disk_is_not_a_models_name(hf: Path, tmp_path: Path, written: object, name: str) -> None:
    change(hf, _name_or_path=written)
    commit = "0123456789abcdef0123456789abcdef01234567"
    downloads = hf / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (downloads / f"{file}.metadata").write_text(f"{commit}\netag\n1764000000.0\n")
    import_hf(hf, tmp_path / "ckpt")
    shape = ModelShape.read(tmp_path / "ckpt")
    assert (shape.base_model, shape.base_revision) == (name, commit)


def test_a_model_of_a_hub_is_downloaded_by_its_revision(hf: Path, tmp_path: Path) -> None:
    """By the hub's own client, from a server on this machine. The second time it comes from the cache, without the server."""
    for name in ("modeling_own.py", "adapter_model.bin", "pytorch_model.bin", "consolidated.safetensors"):
        (hf / name).write_bytes(b"none of the model's")
    with hub(hf, "org/name", revision="v1") as (address, downloaded):
        online = environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
        run(command("convert", "import", hf="org/name@v1", output=tmp_path / "ckpt"), env=online, fresh=True)
        assert sorted(downloaded) == ["config.json", "generation_config.json", "model.safetensors"]
        done = run(
            command("convert", "import", hf="org/name", revision="v2", output=tmp_path / "other"),
            env=online,
            fresh=True,
            expect=2,
        )
        assert done.stderr.startswith(
            "error: org/name: there is no such folder, and the hub does not give it (Revision"
        )
        assert done.stderr.count("\n") == 1
    shape = ModelShape.read(tmp_path / "ckpt")
    assert (shape.base_model, shape.base_revision) == ("org/name", COMMIT)
    offline = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    run(command("convert", "verify", checkpoint=tmp_path / "ckpt", hf="org/name@v1"), env=offline, fresh=True)
    done = run(
        command("convert", "import", hf="org/unknown", output=tmp_path / "other"),
        env=offline,
        fresh=True,
        expect=2,
    )
    assert "org/unknown: there is no such folder, and the hub does not give it" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "other").exists()


def test_a_revision_belongs_to_a_model_of_a_hub(hf: Path) -> None:
    for text, revision, message in (
        (str(hf), "v1", "--revision v1 belongs to a model of a hub"),
        ("no/such/folder", "v1", "is not named like one"),
        ("org/name@v1", "v2", "--revision v2 names another revision"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model_folder(text, revision)
    # Whatever is no name on a hub is a path, and its reader says that it is not there.
    assert model_folder("no/such/folder") == Path("no/such/folder") and model_folder(str(hf)) == hf


def test_verification_tries_places_beyond_every_context_and_window(tmp_path: Path) -> None:
    """YaRN made for 64 of the 512 tokens that the model claims, and a window of 24, none of which the caller names."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    hf = make_model("mistral-window", tmp_path / "hf", rope_parameters=rope)
    said = run(command("convert", "import", hf=hf, output=tmp_path / "ckpt", tokens=20)).stdout
    assert "rows began at 0, 54, 502; past the window of 24 layer 0 differs by" in said
    agreement = compare_logits(tmp_path / "ckpt", hf, [list(range(20))], beyond=True)
    assert agreement.starts == [0, 54, 502] and agreement.is_close and agreement.windows[24] < 1e-6


def test_a_window_that_one_side_ignores_is_found_at_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours attends to everything in spite of the window of 24, which rows of 16 tokens do not show."""
    hf = make_model("mistral-window", tmp_path / "hf")
    import_hf(hf, tmp_path / "ckpt")
    made = AttentionPlan.make
    monkeypatch.setattr(AttentionPlan, "make", lambda *args, **named: made(*args, **{**named, "window": None}))
    rows = [list(range(16))]
    assert compare_logits(tmp_path / "ckpt", hf, rows).is_close
    agreement = compare_logits(tmp_path / "ckpt", hf, rows, beyond=True)
    assert not agreement.is_close and agreement.first_beyond == "layer 0 past the window of 24"


def test_what_transformers_reads_otherwise_is_found_at_any_length(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this program did not know Mistral's default window."""
    hf = Path(shutil.copytree(models / "mistral", tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    del config["sliding_window"]
    (hf / "config.json").write_text(json.dumps(config))
    family = FAMILIES["mistral"]
    defaults = tuple(pair for pair in family.defaults if pair[0] != "sliding_window")
    monkeypatch.setitem(FAMILIES, "mistral", dataclasses.replace(family, defaults=defaults))
    import_hf(hf, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="transformers reads window_size as 4096, but this program as None"):
        compare_logits(tmp_path / "ckpt", hf, [list(range(8))])
