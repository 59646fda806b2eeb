"""What is fuzzed: readers of the package, each with valid files and a function that reads them as the commands do."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import DataError
from tests.support.data import make_data, text_row, tokenised_row, write_data
from tests.support.models import make_chat_model, make_model
from tests.support.tokenizers import TEXT, WORDS, make_fast_tokenizer, make_sentencepiece

# A document of a few chunks.
LONG_TEXT = "\n\n".join(" ".join(random.Random(n).choices(WORDS, k=40)) + "." for n in range(12))


@dataclass(frozen=True)
class Reader:
    """A reader to be fuzzed.

    Attributes:
        name: its name; kept seeds are in a folder of that name.
        make: writes valid files into an empty folder, once.
        files: patterns of the files that are changed.
        read: reads a folder as the commands do; what it returns is compared where a checksum covers the changed file.
        checked: patterns of files that a checksum covers: flipped bits are refused or change nothing.
        mend: makes checksums fit again after a change, as an attacker would.
        batch: inputs per process; 1 where a read leaves the process changed.
        share: share of the time, relative to other readers.
        explained: whether errors of the operating system may come through, which ``run_or_fail`` explains in one line.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    checked: tuple[str, ...] = ()
    mend: Callable[[Path], None] | None = None
    batch: int = 100
    share: float = 1.0
    explained: bool = False


# --------------------------------------------------------------------------------------------------
# Training data
# --------------------------------------------------------------------------------------------------


def _read_data(folder: Path) -> Any:
    from megatron_longpo.data.indexed import PreferenceData

    data = PreferenceData(folder / "data")
    pieces = [[(int(p.mode), p.tokens.tolist()) for p in data[number].pieces] for number in range(len(data))]
    return pieces, data.long_lengths().tolist(), data.manifest


def _mend_data(folder: Path) -> None:
    from megatron_longpo.data.indexed import _checksum

    path = folder / "data.json"
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(path.read_bytes())
        for suffix in ("bin", "idx", "weights.npy"):
            content[f"{suffix.removesuffix('.npy')}_sha256"] = hashlib.sha256(
                (folder / f"data.{suffix}").read_bytes()
            ).hexdigest()
        content["bin_bytes"] = (folder / "data.bin").stat().st_size
        content.pop("manifest_sha256", None)
        path.write_text(json.dumps({**content, "manifest_sha256": _checksum(content)}))


_FINGERPRINT = "fuzz"


def _partial_writer(folder: Path) -> Any:
    from megatron_longpo.data.indexed import Manifest, SampleWriter

    manifest = Manifest(vocab_size=101, dtype="uint16", tokenizer=None, tokenizer_hash=None, template_hash=None)
    return SampleWriter(folder / "data", manifest, _FINGERPRINT)


def _samples() -> list[Any]:
    from tests.support.data import random_sample

    rng = np.random.default_rng(0)
    return [dataclasses.replace(random_sample(rng, 1 + n, context=40), weight=1.0 + n) for n in range(3)]


def _make_partial_data(folder: Path) -> None:
    writer = _partial_writer(folder)
    for number, sample in enumerate(_samples()[:2]):
        writer.add(sample)
        writer.skip("no_turn", {"line": number})
        writer.commit({"line": number})
    writer.close()


def _read_partial_data(folder: Path) -> Any:
    writer = _partial_writer(folder)
    resumed, position = writer.resumed, dict(writer.position)
    writer.add(_samples()[2])
    manifest = writer.finish()
    return resumed, position, manifest


def _cache(folder: Path) -> Any:
    from megatron_longpo.training.reference import ReferenceCache

    return ReferenceCache(folder, {"weights": "w", "data": "d"}, 6)


def _make_cache(folder: Path) -> None:
    cache = _cache(folder)
    table = -np.arange(1.0, 13.0).reshape(6, 2)
    cache.finish(table)
    table[3:] = np.nan
    cache.write_partial(table)


def _read_cache(folder: Path) -> Any:
    cache = _cache(folder)
    partial = cache.partial()
    cache.look()
    table = cache.read()
    cache.release()
    if np.isnan(partial).all():
        raise DataError("the damage of the partial file was found, and all is scored again")
    return partial.tolist(), None if table is None else table.tolist()


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def _command(name: str, *arguments: object) -> None:
    from megatron_longpo.cli import function_of

    function_of(name)([str(argument) for argument in arguments], prog=name)


def _make_hf(folder: Path) -> None:
    """A model with a tokenizer, small enough to be read many times a second."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_model("llama", folder, vocab_size=402, num_key_value_heads=1, **sizes)
    make_fast_tokenizer(folder)


def _make_checkpoint(folder: Path) -> None:
    _make_hf(folder / "hf")
    _command("convert import", "--hf", folder / "hf", "--output", folder / "ckpt")
    shutil.rmtree(folder / "hf")


def _training(folder: Path, *flags: object) -> list[object]:
    return [
        *("--data-path", folder / "data", "--load", folder / "ckpt", "--save", folder / "run", "--objective", "sft"),
        *("--global-batch-size", 2, "--train-iters", 4, "--save-interval", 1, "--lr", "1e-3", "--adam-eps", "1e-4"),
        *("--no-tensorboard", "--plot-interval", 1000, *flags),
    ]


def _make_run(folder: Path) -> None:
    make_model(
        "llama",
        folder / "hf",
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    _command("convert import", "--hf", folder / "hf", "--output", folder / "ckpt")
    shutil.rmtree(folder / "hf")
    make_data(folder / "data", 4, longest=44)
    _command("train", *_training(folder, "--exit-interval", 2))
    shutil.rmtree(folder / "run" / "iter_0000001")


def _mend_checkpoint(folder: Path) -> None:
    from megatron_longpo.checkpoint.checksums import write_checksums

    for path in folder.rglob("checksums.json"):
        path.unlink()
        write_checksums(path.parent)


def _resume(folder: Path) -> None:
    _command("train", *_training(folder, "--exit-interval", 3))


def _read_checkpoint(folder: Path) -> Any:
    """What training, export and verify read of a checkpoint before torch and megatron-core do."""
    from megatron_longpo.checkpoint.checksums import verified
    from megatron_longpo.checkpoint.distributed import DistributedReader
    from megatron_longpo.checkpoint.folders import resolve
    from megatron_longpo.model.shape import ModelShape

    path = resolve(folder / "ckpt")
    with verified(path):
        shape = ModelShape.read(path)
        reader = DistributedReader(path)
        tensors = {
            key: reader.read(key, [0] * len(value.size), list(value.size)).double().sum().item()
            for key, value in sorted(reader._tensors.items())
        }
    return shape, repr(tensors)


def _export(folder: Path) -> None:
    _command("convert export", "--checkpoint", folder / "ckpt", "--output", folder / "out", "--tokens", 4)


def _import(folder: Path) -> None:
    from megatron_longpo.conversion.import_hf import import_hf

    import_hf(folder / "hf", folder / "ckpt")


def _make_pickled(folder: Path) -> None:
    import torch

    make_model(
        "qwen2",
        folder / "hf",
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    from safetensors.torch import load_file

    weights = load_file(folder / "hf" / "model.safetensors")
    (folder / "hf" / "model.safetensors").unlink()
    halves = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(weights.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, part in halves.items():
        torch.save(part, folder / "hf" / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in halves.items() for key in part}}
    (folder / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _engine(folder: Path) -> Any:
    """Everything that generation and evaluation read of a model."""
    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.make import make_engine
    from megatron_longpo.engines.settings import EngineConfig, check_engine

    config = EngineConfig(model=str(folder / "hf"), template_seconds=2.0)
    check_engine(config)
    engine = make_engine(config, 500)
    _ = engine.identity
    return engine.answer([[Prompt(({"role": "user", "content": "Why?"},))]], Sampling(2))


# --------------------------------------------------------------------------------------------------
# Tokenizers and templates
# --------------------------------------------------------------------------------------------------

_TEMPLATE_SECONDS = 1.0


def _use_tokenizer(path: Path, template: str | None) -> Any:
    from megatron_longpo.data.preference import BadRow
    from megatron_longpo.text.chat import Turn, encode_sample, load_tokenizer

    tokenizer = load_tokenizer(path, template, template_seconds=_TEMPLATE_SECONDS)
    turns = [Turn(f"Why {n}?", TEXT[:40], "Yes.", "No.") for n in range(2)]
    with contextlib.suppress(BadRow):
        encode_sample(tokenizer, TEXT[:200], turns)
    return tokenizer.name


def _make_template(folder: Path) -> None:
    from megatron_longpo.text.chat import BUILT_IN_TEMPLATES

    make_fast_tokenizer(folder / "tokenizer")
    for name, template in BUILT_IN_TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(template)


def _read_template(folder: Path) -> None:
    for path in sorted(folder.glob("*.jinja")):
        _use_tokenizer(folder / "tokenizer", str(path))


# --------------------------------------------------------------------------------------------------
# Pairs and documents
# --------------------------------------------------------------------------------------------------


def _make_pairs(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    make_fast_tokenizer(folder / "tokenizer")
    text = b"".join(json.dumps(text_row(n, turns=1 + n)).encode() + b"\n" for n in range(3))
    tokens = b"".join(json.dumps(tokenised_row()).encode() + b"\n" for _ in range(2))
    for name, content in (("text", text), ("tokens", tokens)):
        (folder / f"{name}.jsonl").write_bytes(content)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
        table = pyarrow.Table.from_pylist([json.loads(line) for line in content.splitlines()])
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
        with pyarrow.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)


def _read_pairs(folder: Path) -> Any:
    from megatron_longpo.text.chat import load_tokenizer
    from megatron_longpo.text.preprocess import Settings, input_files, process_row, read_rows

    settings = Settings(vocab_size=101, seq_length=4000, template_seconds=_TEMPLATE_SECONDS)
    found = []
    for kind, tokenizer in (("text", _kept(folder, load_tokenizer)), ("tokens", None)):
        for path in sorted(folder.glob(f"{kind}.*")):
            for row in read_rows(input_files([str(path)]), 0):
                found.append(process_row(row, settings, tokenizer).line)
    return found


_TOKENIZERS: dict[str, Any] = {}


def _kept(folder: Path, load: Callable[[Path], Any]) -> Any:
    """The tokenizer, which is not changed here and takes long to load."""
    if "pairs" not in _TOKENIZERS:
        _TOKENIZERS["pairs"] = load(folder / "tokenizer")
    return _TOKENIZERS["pairs"]


def _make_documents(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    root = folder / "documents"
    root.mkdir()
    make_fast_tokenizer(folder / "tokenizer")
    (root / "plain.txt").write_text(LONG_TEXT)
    (root / "marked.md").write_text("# Title\n\n" + LONG_TEXT)
    (root / "paper.tex").write_text("\\section{One}\n" + LONG_TEXT + "\n\\section{Two}\n" + LONG_TEXT)
    rows = [{"text": LONG_TEXT[n:], "id": n} for n in range(3)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (root / "lines.jsonl").write_bytes(lines)
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (root / "packed.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")


def _read_documents(folder: Path) -> Any:
    from megatron_longpo.engines.settings import EngineConfig
    from megatron_longpo.generation.pairs import Cutter
    from megatron_longpo.generation.settings import DocumentsConfig, GenerationConfig
    from megatron_longpo.text.documents import find_files, read_documents

    if "cutter" not in _TOKENIZERS:
        documents = DocumentsConfig(
            seq_length=300, min_chunk_tokens=50, max_chunk_tokens=100, min_document_tokens=60, overlong="split"
        )
        _TOKENIZERS["cutter"] = Cutter(
            GenerationConfig(documents=documents, engine=EngineConfig(model=str(folder / "tokenizer")))
        )
    cutter, count = _TOKENIZERS["cutter"], 0
    for number, document in enumerate(read_documents(find_files([str(folder / "documents")], "auto"), "text")):
        count += len(cutter.lines(number, document))
    return count


# --------------------------------------------------------------------------------------------------
# Stages of generation
# --------------------------------------------------------------------------------------------------

_GENERATION = """
documents: {seq_length: 1200, min_chunk_tokens: 100, max_chunk_tokens: 300, min_document_tokens: 200, chunks_per_document: 2,
  overlong: cut}
questions: {questions_per_chunk: 1, question_pattern: '(.+)', question_tokens: 6}
answers: {answer_tokens: 6}
engine: {dtype: float32}
filters: {keep_truncated: true, min_question_words: 0, max_quoted_words: 1.0, max_compression: 100.0}
"""


def _make_stages(folder: Path) -> None:
    make_fast_tokenizer(folder / "model")
    make_chat_model(folder / "model")
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(LONG_TEXT[number * 100 :])
    (folder / "config.yaml").write_text(_GENERATION)
    with _within(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        _command(
            *("generate", "--config", "config.yaml", "--documents", "texts", "--model", "model"),
            *("--output", "pairs.jsonl"),
        )
    for name in ("model", "texts"):
        shutil.rmtree(folder / name)
    for path in folder.glob("pairs.jsonl.report/*"):
        path.unlink()


def _merge(folder: Path) -> Any:
    from megatron_longpo.generation.merging import merge

    found = merge(folder / "pairs.jsonl")
    return found, (folder / "pairs.jsonl").read_bytes()


# --------------------------------------------------------------------------------------------------
# Evaluations
# --------------------------------------------------------------------------------------------------


def _make_evaluation(folder: Path) -> None:
    from megatron_longpo.evaluation.folder import SuiteFolder
    from megatron_longpo.evaluation.results import read_or_begin, with_result, write_results
    from megatron_longpo.runtime.files import sha256_of
    from megatron_longpo.runtime.share import Share

    for name in ("one", "two"):
        output = folder / name
        suite = SuiteFolder(output / "ruler", {"seed": 1, "tasks": {"a": 1}}, Share(), by_task=("tasks",))
        task = "niah_single_1"
        rows = [
            {"key": f"ruler/{task}/4096/{n}", "task": task, "length": 4096, "index": n, "score": n / 4, "answer": "x"}
            | {
                "references": ["x"],
                "digest": "d",
                "prompt_tokens": 9,
                "new_tokens": 2,
                "finished": True,
                "seconds": 0.1,
            }
            for n in range(3)
        ]
        suite.add(rows)
        suite.write_samples([str(row["key"]) for row in rows])
        suite.close()
        cell = {"score": 0.25, "samples": 3, "stderr": 0.1, "finished": 1.0, "refused": 0}
        metrics = {"tasks": {task: {"4096": cell}}, "lengths": {"4096": 0.25}, "average": {"score": 0.25}}
        content = with_result(
            read_or_begin(output), "ruler", settings={"seed": 1}, asked={task: 3}, metrics=metrics,
            samples_sha256=sha256_of(output / "ruler" / "samples.jsonl"),
        )  # fmt: skip
        write_results(output, content)


def _mend_evaluation(folder: Path) -> None:
    from megatron_longpo.evaluation.results import write_results

    for name in ("one", "two"):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError, AttributeError):
            content = json.loads((folder / name / "results.json").read_bytes())
            content.pop("sha256", None)
            samples = folder / name / "ruler" / "samples.jsonl"
            content["suites"]["ruler"]["samples_sha256"] = hashlib.sha256(samples.read_bytes()).hexdigest()
            write_results(folder / name, content)


def _read_evaluation(folder: Path) -> Any:
    """Resume a suite, report it, compare it with another."""
    from megatron_longpo.errors import LongPOError
    from megatron_longpo.evaluation.compare import write_comparison
    from megatron_longpo.evaluation.folder import SuiteFolder
    from megatron_longpo.evaluation.report import remove_from_report
    from megatron_longpo.evaluation.results import read_results
    from megatron_longpo.runtime.share import Share

    found: list[Any] = []
    first_error: Exception | None = None
    for step in (0, 1, 2):
        try:
            if step == 0:
                suite = SuiteFolder(
                    folder / "one" / "ruler", {"seed": 1, "tasks": {"a": 1}}, Share(), by_task=("tasks",)
                )
                try:
                    found.append(sorted(suite.done()))
                    suite.write_samples([f"ruler/niah_single_1/4096/{n}" for n in range(3)])
                finally:
                    suite.close()
            elif step == 1:
                write_comparison([folder / "one", folder / "two"], folder / "comparison", 0)
            else:
                read_results(folder / "one")
                remove_from_report(folder / "one", ["needle"])
        except LongPOError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def _make_suite_data(folder: Path) -> None:
    for task in ("longbook_qa_eng", "longbook_choice_eng", "longbook_sum_eng"):
        row = {"context": TEXT, "input": "Who?", "answer": ["Ann"], "options": ["Bob", "Ann", "Cid", "Dan"]}
        (folder / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    squad_rows = [
        {"title": f"t{n}", "context": f"{n} {TEXT}", "question": "Where?", "answers": {"text": ["there"]}}
        for n in range(3)
    ]
    (folder / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in squad_rows))
    qa = {"question": "Where?", "answers": [{"text": "there"}]}
    (folder / "squad.json").write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": [qa]}]}]})
    )
    hotpot = {
        "question": "Who?",
        "answer": "Ann",
        "context": [["t", ["s."]], ["u", ["r."]]],
        "supporting_facts": [["t", 0]],
    }
    (folder / "hotpot.json").write_text(json.dumps([hotpot] * 2))
    hub = {**hotpot, "context": {"title": ["t"], "sentences": [["s."]]}, "supporting_facts": {"title": ["t"]}}
    (folder / "hotpot.jsonl.gz").write_bytes(gzip.compress((json.dumps(hub) + "\n").encode()))
    (folder / "words.txt").write_text("\n".join(WORDS))
    (folder / "essay.txt").write_text(LONG_TEXT)


def _read_suite_data(folder: Path) -> None:
    from megatron_longpo.errors import LongPOError
    from megatron_longpo.evaluation.materials import read_essays, read_hotpotqa, read_squad, read_words, sentences_of
    from megatron_longpo.evaluation.suites import infinitebench

    readers: list[Callable[[], Any]] = [
        *(
            lambda t=task: _prompts(infinitebench.read_task(folder, t), t)
            for task in ("longbook_qa_eng", "longbook_choice_eng", "longbook_sum_eng")
        ),  # type: ignore[misc]
        *(lambda n=name: read_squad(folder / n) for name in ("squad.jsonl", "squad.json")),  # type: ignore[misc]
        *(lambda n=name: read_hotpotqa(folder / n) for name in ("hotpot.json", "hotpot.jsonl.gz")),  # type: ignore[misc]
        lambda: read_words(str(folder / "words.txt")),
        lambda: sentences_of(read_essays.__wrapped__((str(folder / "essay.txt"),))),
    ]

    def _prompts(books: Any, task: str) -> None:
        for row in books.rows:
            infinitebench.prompt_of(row, task, "chat")

    first_error = None
    for read in readers:
        try:
            read()
        except LongPOError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _make_short_data(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    choices = {"text": ["a", "b", "c", "d"], "label": list("ABCD")}
    arc = [
        {"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]} for n in range(30)
    ]
    for task in ("arc_challenge",):
        (folder / task).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(arc), folder / task / "train.parquet")
        (folder / task / "test.jsonl").write_text("")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(arc[:4]), folder / task / "test.parquet")
    (folder / "winogrande").mkdir()
    rows = [{"sentence": f"It _ {n}.", "option1": "Ann", "option2": "Bob", "answer": str(1 + n % 2)} for n in range(12)]
    (folder / "winogrande" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "winogrande" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_short_data(folder: Path) -> None:
    from megatron_longpo.evaluation.suites.short_context import load_tasks

    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # type: ignore[attr-defined]
    datasets.disable_progress_bars()
    load_tasks(["winogrande"], folder, None, 0)


# --------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------


def _make_yaml(folder: Path) -> None:
    import yaml

    from megatron_longpo.config import Config
    from megatron_longpo.evaluation.settings import EvaluationConfig
    from megatron_longpo.generation.settings import GenerationConfig

    given: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
        "train": (Config(), {"checkpoint": {"load": "c", "save": "s"}, "data": {"data_path": "d"}}),
        "generate": (
            GenerationConfig(),
            {"documents": {"documents": ["d"]}, "engine": {"model": "m"}, "run": {"output": "o"}},
        ),
        "evaluate": (
            EvaluationConfig(),
            {"evaluate": {"output": "o", "tasks": ["needle"]}, "engine": {"model": "m"}, "needle": {"haystack": ["h"]}},
        ),
    }
    for name, (config, changes) in given.items():
        content = yaml.safe_load(config.as_yaml())
        for section, values in changes.items():
            content[section].update({k: v for k, v in values.items() if k in content[section]})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    from megatron_longpo.planner.machine import FOLDER, machine_names

    shutil.copy(FOLDER / f"{machine_names()[0]}.yaml", folder / "machine.yaml")


def _read_yaml(folder: Path) -> None:
    from megatron_longpo import config as training
    from megatron_longpo.errors import LongPOError
    from megatron_longpo.evaluation import settings as evaluation
    from megatron_longpo.generation import settings as generation
    from megatron_longpo.planner.machine import load_machine
    from megatron_longpo.training.optimization import check_schedule

    first_error = None
    try:
        load_machine(str(folder / "machine.yaml"))
    except LongPOError as error:
        first_error = error
    for name, root, check in (
        ("train", training.Config, training.check),
        ("generate", generation.GenerationConfig, generation.check),
        ("evaluate", evaluation.EvaluationConfig, evaluation.check),
    ):
        try:
            config: Any = training.from_yaml(folder / f"{name}.yaml", root)  # type: ignore[type-var]
            config.as_yaml()
            check(config)
            if name == "train":
                check_schedule(config, config.training.train_iters or 1000)
        except LongPOError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


# --------------------------------------------------------------------------------------------------
# Rounds of self-evolution
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Python 3.10 has no contextlib.chdir."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _make_evolution(folder: Path) -> None:
    from megatron_longpo.commands.evolve import _planner
    from megatron_longpo.data.indexed import Manifest
    from megatron_longpo.evaluation.compare import Difference
    from megatron_longpo.evolution import run
    from megatron_longpo.evolution.gate import decide, origin_of, write_gate
    from megatron_longpo.evolution.records import Record, write_record
    from megatron_longpo.evolution.settings import GateRule
    from megatron_longpo.evolution.split import split_pairs
    from megatron_longpo.runtime.checked_json import write_checked
    from megatron_longpo.runtime.files import sha256_of, write_checksum
    from tests.support.rounds import write_rounds

    with _within(folder):
        # Names of folders that move with the files.
        write_rounds(Path("."), resources={"generate": {"array": 2}}, rounds=[{"name": "first"}])
        for name in ("model", "texts"):
            Path(name).mkdir()
        planner = _planner("rounds.yaml")
        paths = planner.folder("first")
        paths.root.mkdir(parents=True)
        paths.pairs.write_text("".join(json.dumps({**text_row(n), "id": f"d{n}-{n:012x}"}) + "\n" for n in range(4)))
        write_checksum(paths.pairs, sha256_of(paths.pairs))
        split_pairs(paths.pairs, paths.train_pairs, paths.held_out_pairs, fraction=0.3, seed=1)
        line = Difference("ruler", "average", "all", "longpo", 0.5, 0.75, 0.125, 0.375, True, 9)
        paths.comparison.mkdir()
        write_checked(paths.comparison / "comparison.json", {"first": "before", "differences": [vars(line)]})
        write_gate(paths.gate, decide([GateRule(suite="ruler", at_least=0.0)], paths.comparison, "longpo"))
        report = Path(f"{paths.pairs}.report")
        report.mkdir()
        write_checked(report / "report.json", {"counts": {"documents": 4}, "reasons": {"empty": 1}})
        samples = Manifest(101, "uint16", None, None, None, samples=3, turns=5, tokens=99, longest=40, longest_short=9)
        Path(f"{paths.data}.json").write_bytes(samples.as_json())
        origin = origin_of(planner, 0)
        assert origin is not None
        for stage in planner.stages(planner.evolution.rounds[0], origin):
            stage.folder.mkdir(parents=True)
            settings = run.settings_of(stage)
            write_record(stage.folder, Record("done", "", settings, run.outputs_of(stage), 9.5, 2, 1, 0))
        write_checked(paths.stage("generate") / "part-0.json", {"seconds": 5.5})
        write_checked(planner.evolution.output / "jobs.json", {"first/generate": "17", "first/split": "18"})


def _read_evolution(folder: Path) -> Any:
    from megatron_longpo.commands.evolve import _planner
    from megatron_longpo.evaluation.compare import read_comparison
    from megatron_longpo.evolution import run, slurm
    from megatron_longpo.evolution.gate import origin_of
    from megatron_longpo.evolution.report import write_report
    from megatron_longpo.evolution.split import split_pairs
    from megatron_longpo.evolution.status import read_status

    with _within(folder):
        planner = _planner("rounds.yaml")
        paths = planner.folder(planner.evolution.rounds[0].name)
        statuses = [(each.stage.id, each.word, each.record) for each in read_status(planner)]
        jobs = slurm._read_jobs(planner.evolution.output / "jobs.json")
        seconds = run._seconds_of(paths.stage("generate") / "part-0.json")
        write_report(planner, Path("report.html"))
        split_pairs(paths.pairs, paths.train_pairs, paths.held_out_pairs, fraction=0.3, seed=1)
        drawn = paths.train_pairs.read_bytes()
        known = sorted((k, str(v)) for k, v in jobs.items() if k.startswith("first/"))
        return statuses, origin_of(planner, 1), read_comparison(paths.comparison), known, seconds, drawn


# --------------------------------------------------------------------------------------------------
# Small files of a run
# --------------------------------------------------------------------------------------------------


def _make_small(folder: Path) -> None:
    import yaml

    from megatron_longpo.config import Config
    from megatron_longpo.model.shape import ModelShape
    from megatron_longpo.runtime.status import StatusFile
    from megatron_longpo.training.held_out import kept_rows  # noqa: F401

    record = {
        "step": 1,
        "loss": 5.5,
        "nll": 5.0,
        "preference": 0.5,
        "lr": 1e-5,
        "tokens": 9,
        "by_length": {"512": {"loss": 1.0}},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**record, "step": n}) + "\n" for n in range(1, 6)))
    (folder / "validation.jsonl").write_text(json.dumps({**record, "samples": 3}) + "\n")
    (folder / ".holder.json").write_text(json.dumps({"host": "h", "process": 1, "started": "now", "command": "c"}))
    (folder / "latest_checkpointed_iteration.txt").write_text("5\n")
    StatusFile(folder, train_iters=9).write("running", step=5)
    (folder / "other").mkdir()
    for name in ("metrics.jsonl", "validation.jsonl"):
        shutil.copy(folder / name, folder / "other")
    (folder / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(Config().as_yaml())))
    from megatron_longpo.checkpoint.card import training_record
    from megatron_longpo.data.indexed import Manifest

    manifest = Manifest(101, "uint16", None, None, None, samples=3, turns=5, tokens=99, longest=40, longest_short=9)
    records = [{k: v for k, v in record.items() if k != "by_length"}]
    made = training_record(step=5, train_iters=5, layout="tp1", manifest=manifest.as_dict(), records=records)
    (folder / "training.json").write_text(json.dumps(made))
    shape = ModelShape(
        family="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1,
        kv_channels=4, vocab_size=9, layernorm_epsilon=1e-5, add_qkv_bias=False, untie_embeddings_and_output_weights=False,
        rotary_base=1e4, max_position_embeddings=64,
    )  # fmt: skip
    shape.write(folder)


def _read_small(folder: Path) -> None:
    from rich.console import Console

    from megatron_longpo.checkpoint.card import write_card
    from megatron_longpo.checkpoint.folders import passed_over, whole_steps
    from megatron_longpo.errors import LongPOError
    from megatron_longpo.model.shape import ModelShape
    from megatron_longpo.runs.compare import compare_runs
    from megatron_longpo.runs.watch import look, render
    from megatron_longpo.runtime.files import FolderLock, holder_of
    from megatron_longpo.training.metrics import keep_until, read_metrics

    first_error = None

    def card() -> None:
        (folder / "out").mkdir()
        write_card(folder, folder / "out", ModelShape.read(folder), "float32")

    for read in (
        lambda: read_metrics(folder / "metrics.jsonl"),
        lambda: (keep_until(folder / "metrics.jsonl", 3), keep_until(folder / "validation.jsonl", 3)),
        lambda: _curves(folder),
        lambda: (holder_of(folder), FolderLock(folder, record=True).release()),
        lambda: (passed_over(folder), whole_steps(folder)),
        lambda: Console(file=io.StringIO()).print(render(look(folder))),
        lambda: compare_runs(folder, folder / "other"),
        card,
    ):
        try:
            read()
        except LongPOError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _curves(folder: Path) -> None:
    """Pictures do not fail a run: what drawing raises is logged. What it computes before is not."""
    from megatron_longpo.training.metrics import read_metrics

    for record in read_metrics(folder / "metrics.jsonl"):
        json.dumps(record)


# --------------------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------------------


def _make_replies(folder: Path) -> None:
    make_fast_tokenizer(folder / "tokenizer")
    choice = {"message": {"role": "assistant", "content": "An answer."}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}).encode()
    replies = {
        "plain": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body),
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "packed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(body),
        "late": b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
        "wrong": b'HTTP/1.1 400 No\r\nContent-Length: 27\r\n\r\n{"error": "context too long"',
    }
    for name, reply in replies.items():
        (folder / f"{name}.http").write_bytes(reply)


class _Server:
    """Sends a given reply to every request, and hangs up."""

    def __init__(self) -> None:
        self.reply = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.settimeout(2)
                request = connection.recv(65536)
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                connection.sendall(self.reply)


_SERVER: dict[str, Any] = {}


def _ask(folder: Path) -> None:
    from megatron_longpo.engines import openai_engine
    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.settings import EngineConfig
    from megatron_longpo.errors import LongPOError

    if not _SERVER:
        openai_engine._BASE_PAUSE_SECONDS = 0.001
        server = _Server()
        config = EngineConfig(
            engine="openai", model="m", tokenizer=str(folder / "tokenizer"), base_url=f"http://127.0.0.1:{server.port}/v1",
            timeout_seconds=0.5, request_seconds=1.0, retries=1, retry_after_seconds=0.05, concurrency=1,
        )  # fmt: skip
        _SERVER.update(server=server, engine=openai_engine.OpenAIEngine(config))
    first_error = None
    for path in sorted(folder.glob("*.http")):
        _SERVER["server"].reply = path.read_bytes()
        try:
            _SERVER["engine"].answer([[Prompt(({"role": "user", "content": "Why?"},))]], Sampling(5))
        except LongPOError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _make_only(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (make_sentencepiece if name == "sentencepiece" else make_fast_tokenizer)(folder / name)

    return make


def readers() -> dict[str, Reader]:
    """All readers, by name."""
    every = [
        Reader("indexed_binaries", lambda f: write_data(f / "data", _samples()) and None, ("data.*",), _read_data,
               checked=("data.bin", "data.idx", "data.json", "data.weights.npy"), mend=_mend_data),
        Reader("partial_binaries", _make_partial_data, ("data.partial/*",), _read_partial_data,
               checked=("data.partial/*",)),
        Reader("reference_cache", _make_cache, ("*",), _read_cache, checked=("*.npy", "*.partial")),
        Reader("checkpoint", _make_checkpoint, ("ckpt/*", "ckpt/.metadata"), _read_checkpoint,
               checked=("ckpt/*", "ckpt/.metadata"), mend=_mend_checkpoint, share=1.5),
        Reader("export", _make_checkpoint, ("ckpt/*", "ckpt/.metadata", "ckpt/hf/*"), _export, mend=_mend_checkpoint, batch=1,
               share=2.0, explained=True),
        Reader("resume", _make_run, ("run/*", "run/iter_*/*", "run/iter_*/.metadata", "run/iter_*/common.pt"), _resume,
               mend=_mend_checkpoint, batch=1, share=3.0, explained=True),
        Reader("import", lambda f: _make_hf(f / "hf"), ("hf/config.json", "hf/model.safetensors", "hf/tokenizer.json"), _import,
               share=1.5),
        Reader("import_shards", _make_pickled, ("hf/*.bin", "hf/*index.json", "hf/config.json"), _import),
        Reader("model_of_engine", lambda f: _make_hf(f / "hf"), ("hf/*",), _engine, share=1.5, batch=20),
        Reader("tokenizer", _make_only("tokenizer"), ("tokenizer/*",), lambda f: _use_tokenizer(f / "tokenizer", None), batch=20),
        Reader("sentencepiece", _make_only("sentencepiece"), ("sentencepiece/tokenizer.model",),
               lambda f: _use_tokenizer(f / "sentencepiece" / "tokenizer.model", "chatml"), batch=30),
        Reader("chat_template", _make_template, ("*.jinja",), _read_template, batch=20),
        Reader("pairs", _make_pairs, ("text.*", "tokens.*"), _read_pairs, batch=20, share=1.5),
        Reader("documents", _make_documents, ("documents/*",), _read_documents, batch=5),
        Reader("stages", _make_stages, ("pairs.jsonl.work/*", "pairs.jsonl.work/*/*.json*"), _merge,
               checked=("pairs.jsonl.work/*/*.jsonl",), batch=20, share=1.5),
        Reader("evaluation", _make_evaluation, ("*/*.json", "*/ruler/*.json*", "*/ruler/parts/*/*"), _read_evaluation,
               mend=_mend_evaluation, batch=20, share=1.5),
        Reader("suite_data", _make_suite_data, ("*",), _read_suite_data),
        Reader("short_data", _make_short_data, ("winogrande/*",), _read_short_data, batch=1, share=1.0),
        Reader("yaml", _make_yaml, ("*.yaml",), _read_yaml, batch=30, share=1.5),
        Reader("evolution", _make_evolution, ("rounds.yaml", "rounds/jobs.json", "rounds/*/*.json*", "rounds/*/*/*.json",
               "rounds/*/stages/*/*.json"), _read_evolution, checked=("rounds/*.json", "rounds/*/pairs.jsonl"), batch=20),
        Reader("run_files", _make_small, ("*", ".holder.json"), _read_small),
        Reader("server", _make_replies, ("*.http",), _ask, batch=20),
    ]  # fmt: skip
    return {reader.name: reader for reader in every}


def files_of(reader: Reader, folder: Path) -> list[str]:
    """Names of the files that are changed, relative to the folder of the valid ones."""
    found = {path for pattern in reader.files for path in folder.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in found)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition holds within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def names() -> Iterator[str]:
    """Names of all readers."""
    yield from readers()
