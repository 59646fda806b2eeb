"""A bit flipped at 200 random places in each kind of file that is written and read again: found, or in bytes that nothing uses.

A reader finds it by refusing the file by name, or by leaving out what is damaged, which is computed again. Whatever a reader
returns in spite of it is what it returned before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_longpo.checkpoint.checksums import find_damage, verified_if_listed, write_checksums
from megatron_longpo.checkpoint.distributed import LazyChunk, write_distributed
from megatron_longpo.checkpoint.folders import folder_of, latest_step, resolve
from megatron_longpo.data.indexed import Manifest, PreferenceData, SampleWriter
from megatron_longpo.errors import DataError, LongPOError
from megatron_longpo.evaluation.compare import Difference, read_comparison, read_evaluation
from megatron_longpo.evaluation.folder import SuiteFolder, settings_of
from megatron_longpo.evaluation.results import read_or_begin, with_result, write_results
from megatron_longpo.evolution import run, slurm
from megatron_longpo.evolution.gate import decide, read_gate, write_gate
from megatron_longpo.evolution.plan import RoundFolder
from megatron_longpo.evolution.records import Record, read_record, write_record
from megatron_longpo.evolution.report import _data as counts_of
from megatron_longpo.evolution.settings import GateRule
from megatron_longpo.evolution.split import split_pairs
from megatron_longpo.generation.report import Report
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import (
    Stage,
    read_config,
    read_lines,
    read_stage_manifest,
    work_folder,
    write_config,
)
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import FolderLock, check_checksum, sha256_of, write_checksum
from megatron_longpo.runtime.json_lines import encode_line
from megatron_longpo.runtime.machine_record import Machine, WrongKernel
from megatron_longpo.runtime.machine_record import Record as MachineRecord
from megatron_longpo.runtime.machine_record import read_record as read_machine_record
from megatron_longpo.runtime.machine_record import write_record as write_machine_record
from megatron_longpo.runtime.share import Share
from megatron_longpo.runtime.status import StatusFile, read_status
from megatron_longpo.training.best import Best, Rule, write_best
from megatron_longpo.training.metrics import read_metrics
from megatron_longpo.training.reference import ReferenceCache
from tests.support.data import random_sample, text_row, write_data
from tests.support.models import make_model
from tests.support.tokenizers import make_fast_tokenizer

FLIPS = 200


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: writes a valid file, and what belongs to it, into an empty folder.
        file: the file, relative to the folder.
        read: reads it as the package does; what it returns is compared.
        unused: most flips in bytes that nothing uses, such as the name of the checksum itself.
        writes: whether reading changes the folder.
    """

    make: Callable[[Path], None]
    file: str
    read: Callable[[Path], Any]
    unused: int = 0
    writes: bool = False


def all_or_error(found: list[Any], expected: int) -> list[Any]:
    """What is left out because it is damaged is computed again: it counts as found."""
    if len(found) < expected:
        raise DataError(f"{expected - len(found)} are left out")
    return found


# --------------------------------------------------------------------------------------------------
# Checkpoints and runs
# --------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> None:
    """As import and training write it, with small tensors."""
    (folder / "hf").mkdir()
    values = {f"weight.{n}": torch.arange(24.0).view(4, 6) * (n + 1) for n in range(3)}
    write_distributed(
        folder,
        [LazyChunk(k, (4, 6), (0, 0), (4, 6), torch.float32, lambda v=v: v) for k, v in values.items()],  # type: ignore[misc]
    )
    for name in ("model.json", "run.yaml", "training.json", "hf/config.json", "hf/tokenizer.json"):
        (folder / name).write_text(json.dumps({"schema_version": 1, "name": name, "value": 0.5}, indent=2))
    write_checksums(folder)


def read_checkpoint(folder: Path) -> str:
    damage = find_damage(folder)
    if damage is not None:
        raise damage.error()
    files = [
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "checksums.json"
    ]
    return hashlib.sha256(b"".join(files)).hexdigest()


CHECKPOINT_FILES = (
    *("__0_0.distcp", ".metadata", "common.pt", "metadata.json", "model.json", "run.yaml", "training.json"),
    *("hf/config.json", "hf/tokenizer.json", "checksums.json"),
)


def make_export(folder: Path) -> None:
    """A model folder with the checksums that an export writes."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_model("llama", folder, num_key_value_heads=1, **sizes)
    make_fast_tokenizer(folder)
    write_checksums(folder)


def read_export(folder: Path) -> str:
    with verified_if_listed(folder):
        pass
    return read_checkpoint(folder)


def make_run(folder: Path) -> None:
    for step in (1, 2, 3, 10, 11):
        folder_of(folder, step).mkdir()
        (folder_of(folder, step) / "metadata.json").write_text("{}")
        for name in ("model.json", ".metadata"):
            (folder_of(folder, step) / name).touch()
    (folder / "latest_checkpointed_iteration.txt").write_text("11\n")
    write_best(folder, Rule("nll", "min"), Best(10, 2.5))
    write_checked(folder / "trackers.json", {"mlflow": "0123456789abcdef", "wandb": "run7"})
    lines = [{"step": n, "loss": 5.5, "nll": 5.0 / n, "lr": 1e-5, "tokens": 9 * n} for n in range(1, 6)]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    lines = [{**line, "samples": 3, "by_length": {"512": {"loss": 1.0}}} for line in lines]
    (folder / "validation.jsonl").write_bytes(b"".join(map(encode_line, lines)))


def make_holder(folder: Path) -> None:
    """As a process that was killed leaves it."""
    FolderLock(folder, record=True)._close()
    StatusFile(folder, train_iters=9).write("running", step=5)


def figures(name: str) -> Callable[[Path], Any]:
    """The name of the checksum is no figure, so a line in which it is damaged is left out."""
    return lambda folder: all_or_error(read_metrics(folder / name), 5)


def locked(folder: Path) -> bool:
    FolderLock(folder, record=True).release()
    return True


def make_record(folder: Path) -> None:
    machine = Machine("h", "cuda", "H100", "570", "13.0", "9.19", "2.13", "0.16.1", "")
    wrong = (WrongKernel("attention/flash/bfloat16", "differs by 0.5", "use another"),)
    write_machine_record(MachineRecord(machine, "2026-11-26", wrong), folder / "doctor-h.json")


def read_doctors(folder: Path) -> MachineRecord:
    """A damaged one does not count, which is logged."""
    found = read_machine_record(folder / "doctor-h.json")
    if found is None:
        raise DataError("it is logged")
    return found


def known(content: dict[str, Any], *names: str) -> list[Any]:
    return [content[name] for name in names]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def samples() -> list[Any]:
    rng = np.random.default_rng(0)
    return [dataclasses.replace(random_sample(rng, 1 + n, context=40), weight=1.0 + n) for n in range(3)]


def make_data(folder: Path) -> None:
    write_data(folder / "data", samples())


def read_data(folder: Path) -> Any:
    data = PreferenceData(folder / "data")
    pieces = [[(int(p.mode), p.tokens.tolist()) for p in data[n].pieces] for n in range(len(data))]
    return pieces, data.weights.tolist(), data.manifest


def writer(folder: Path) -> SampleWriter:
    return SampleWriter(folder / "data", Manifest(101, "uint16", None, None, None), "settings")


def make_partial_data(folder: Path) -> None:
    begun = writer(folder)
    for number, sample in enumerate(samples()):
        begun.add(sample)
        begun.skip("no_turn", {"line": number})
    begun.commit({"rows": 4})
    begun.close()


def read_partial_data(folder: Path) -> Any:
    resumed = writer(folder)
    resumed.close()
    return resumed.resumed, resumed.position, resumed.manifest


def cache(folder: Path) -> ReferenceCache:
    return ReferenceCache(folder, {"weights": "w", "data": "d"}, 6)


def make_cache(folder: Path) -> None:
    table = -np.arange(1.0, 13.0).reshape(6, 2)
    cache(folder).finish(table)
    table[3:] = np.nan
    cache(folder).write_partial(table)
    for path in folder.iterdir():
        path.rename(folder / f"cache{path.suffix}")


def read_cache(folder: Path) -> Any:
    one = cache(folder)
    one.name = "cache"
    partial = one.partial()
    if np.isnan(partial).all():
        raise DataError("its values are scored again")
    table = one.read()
    assert table is not None
    return table.tolist(), partial[:3].tolist()


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [{"number": n, "part": 0, "text": "The tower stands. " * 3} for n in range(5)]


def make_generation(folder: Path) -> None:
    with Stage(folder, "documents", {"seed": 1, "model": "0123abcd"}) as stage:
        stage.append(ROWS)
    stage.finish()
    work_folder(folder / "pairs.jsonl").mkdir()
    write_config(folder / "pairs.jsonl", GenerationConfig())
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({**text_row(n), "id": f"d{n}-{n:012x}"}) + "\n" for n in range(4)))
    write_checksum(pairs, sha256_of(pairs))
    split_pairs(pairs, folder / "train.jsonl", folder / "held_out.jsonl", fraction=0.3, seed=1)


def read_pairs(name: str) -> Callable[[Path], bytes]:
    def read(folder: Path) -> bytes:
        check_checksum(folder / name, sha256_of(folder / name))
        return (folder / name).read_bytes()

    return read


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

KEYS = [f"ruler/vt/4096/{n}" for n in range(6)]


def suite(folder: Path) -> SuiteFolder:
    return SuiteFolder(folder / "ruler", {"seed": 1234, "model": "0123abcd"}, Share())


def make_evaluation(folder: Path) -> None:
    open_suite = suite(folder)
    rows = [{"key": key, "task": "vt", "length": 4096, "index": n, "score": n / 8} for n, key in enumerate(KEYS)]
    open_suite.add(rows)
    open_suite.write_samples(KEYS)
    open_suite.close()
    cell = {"score": 0.5, "samples": 6, "stderr": 0.0, "finished": 1.0, "refused": 0}
    metrics = {"tasks": {"vt": {"4096": cell}}, "lengths": {"4096": 0.5}, "average": {"score": 0.5}}
    checksum = sha256_of(folder / "ruler" / "samples.jsonl")
    content = with_result(
        read_or_begin(folder), "ruler", settings={"seed": 1}, asked={"x": 6}, metrics=metrics, samples_sha256=checksum
    )
    write_results(folder, content)
    line = Difference("ruler", "average", "all", "longpo", 0.5, 0.75, 0.125, 0.375, True, 9)
    write_checked(folder / "comparison.json", {"first": "before", "differences": [vars(line)] * 3})


def read_answers(folder: Path) -> list[Any]:
    open_suite = suite(folder)
    found = [(row["key"], row["score"]) for row in open_suite.rows()]
    open_suite.close()
    return all_or_error(found, len(KEYS))


def read_scores(folder: Path) -> Any:
    # Finds nothing of its own damaged.
    return read_evaluation(folder).scores, read_or_begin(folder)["suites"]


def read_asked(folder: Path) -> list[str]:
    """An evaluation of another length, which adds to what was asked."""
    open_suite = suite(folder)
    open_suite.add([{"key": "ruler/vt/8192/0", "task": "vt", "length": 8192, "index": 0, "score": 1.0}])
    found = [row["key"] for row in open_suite.write_samples(["ruler/vt/8192/0"])]
    open_suite.close()
    return found


# --------------------------------------------------------------------------------------------------
# Rounds
# --------------------------------------------------------------------------------------------------


def make_round(folder: Path) -> None:
    line = Difference("ruler", "average", "all", "longpo", 0.5, 0.75, 0.125, 0.375, True, 9)
    write_checked(folder / "comparison.json", {"first": "before", "differences": [vars(line)]})
    write_gate(folder / "gate.json", decide([GateRule(suite="ruler", at_least=0.0)], folder, "longpo"))
    settings = {"command": ["train"], "config": {"optimizer": {"lr": 1e-5}}, "flags": [], "inputs": {"model": "0:1a"}}
    write_record(folder, Record("done", "0123", settings, "4567", 9.5, 2, 1, 0))
    write_checked(folder / "part-0.json", {"seconds": 5.5})
    write_checked(folder / "jobs.json", {"first/generate": "17", "first/split": "18"})
    report = Report(3, 1)
    report.counts["documents"], report.reasons["empty"] = 4, 2
    report.write(folder / "pairs.jsonl.report", "config")


KINDS: dict[str, Kind] = {
    **{f"checkpoint: {name}": Kind(make_checkpoint, name, read_checkpoint) for name in CHECKPOINT_FILES},
    **{
        f"exported model: {name}": Kind(make_export, name, read_export)
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "checksums.json")
    },
    # The folders tell which checkpoints there are; this file only what a crash may have lost.
    "run: latest_checkpointed_iteration.txt": Kind(
        make_run, "latest_checkpointed_iteration.txt", latest_step, unused=FLIPS
    ),
    "run: best.json": Kind(make_run, "best.json", lambda folder: resolve(folder / "best").name, unused=20),
    "run: trackers.json": Kind(
        make_run,
        "trackers.json",
        lambda folder: known(checked(folder / "trackers.json"), "mlflow", "wandb"),
        unused=20,
    ),
    "run: metrics.jsonl": Kind(make_run, "metrics.jsonl", figures("metrics.jsonl")),
    "run: validation.jsonl": Kind(make_run, "validation.jsonl", figures("validation.jsonl")),
    # For people: the lock is the kernel's.
    "run: .holder.json": Kind(make_holder, ".holder.json", locked, unused=FLIPS, writes=True),
    "run: heartbeat.json": Kind(make_holder, "heartbeat.json", read_status, unused=20),
    **{f"data: {name}": Kind(make_data, f"data.{name}", read_data) for name in ("bin", "idx", "json", "weights.npy")},
    **{
        f"preprocessing broken off: {name}": Kind(make_partial_data, f"data.partial/{name}", read_partial_data)
        for name in ("bin", "lengths", "modes", "documents", "weights", "rejects")
    },
    "preprocessing broken off: progress.json": Kind(
        make_partial_data, "data.partial/progress.json", read_partial_data, unused=20
    ),
    "reference cache: table": Kind(make_cache, "cache.npy", read_cache),
    "reference cache: partial table": Kind(make_cache, "cache.partial", read_cache),
    # Of this file only the table's checksum is read.
    "reference cache: description": Kind(make_cache, "cache.json", read_cache, unused=FLIPS),
    "generation: a stage": Kind(
        make_generation,
        "documents.jsonl",
        lambda folder: [known(row, "number", "part", "text") for row in read_lines(folder / "documents.jsonl")],
        unused=20,
    ),
    "generation: manifest of a stage": Kind(
        make_generation,
        "documents.manifest.json",
        lambda folder: known(
            read_stage_manifest(folder / "documents.manifest.json"), "stage", "finished", "records", "identity"
        ),
        unused=20,
    ),
    "generation: run.yaml": Kind(
        make_generation, "pairs.jsonl.work/run.yaml", lambda folder: read_config(folder / "pairs.jsonl"), unused=20
    ),
    "generation: pairs": Kind(make_generation, "pairs.jsonl", read_pairs("pairs.jsonl")),
    # The name behind the checksum is for sha256sum.
    "generation: checksum of the pairs": Kind(
        make_generation, "pairs.jsonl.sha256", read_pairs("pairs.jsonl"), unused=60
    ),
    "rounds: train.jsonl": Kind(make_generation, "train.jsonl", read_pairs("train.jsonl")),
    "rounds: held_out.jsonl": Kind(make_generation, "held_out.jsonl", read_pairs("held_out.jsonl")),
    "evaluation: answers.jsonl": Kind(
        make_evaluation, "ruler/parts/0-of-1/answers.jsonl", read_answers, unused=20, writes=True
    ),
    "evaluation: samples.jsonl": Kind(make_evaluation, "ruler/samples.jsonl", read_scores),
    "evaluation: results.json": Kind(make_evaluation, "results.json", read_scores, unused=20),
    "evaluation: settings.json": Kind(
        make_evaluation,
        "ruler/settings.json",
        lambda folder: known(settings_of(folder / "ruler"), "seed", "model"),
        unused=20,
    ),
    "evaluation: asked.json": Kind(make_evaluation, "ruler/asked.json", read_asked, unused=20, writes=True),
    "evaluation: comparison.json": Kind(make_evaluation, "comparison.json", read_comparison, unused=20),
    # 1E-05 is 1e-05.
    "rounds: record.json": Kind(make_round, "record.json", read_record, unused=4),
    "rounds: gate.json": Kind(make_round, "gate.json", lambda folder: read_gate(folder / "gate.json"), unused=20),
    "doctor's record": Kind(make_record, "doctor-h.json", read_doctors, unused=20),
    "rounds: part-0.json": Kind(
        make_round, "part-0.json", lambda folder: run._seconds_of(folder / "part-0.json"), unused=20
    ),
    "rounds: jobs.json": Kind(
        make_round,
        "jobs.json",
        lambda folder: known(slurm._read_jobs(folder / "jobs.json"), "first/generate", "first/split"),
        unused=20,
    ),
    "rounds: report.json": Kind(
        make_round, "pairs.jsonl.report/report.json", lambda folder: counts_of(RoundFolder(folder)), unused=20
    ),
}


def checked(path: Path) -> dict[str, Any]:
    """Where the caller goes on without the file, which it says."""
    try:
        return read_checked(path)
    except ValueError as error:
        raise DataError(str(error)) from None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], Path]:
    """Makes each folder once."""
    folders: dict[Callable[[Path], None], Path] = {}

    def of(make: Callable[[Path], None]) -> Path:
        if make not in folders:
            folders[make] = tmp_path_factory.mktemp(make.__name__)
            make(folders[make])
        return folders[make]

    return of


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_found_or_in_unused_bytes(
    made: Callable[[Callable[[Path], None]], Path], tmp_path: Path, name: str
) -> None:
    kind = KINDS[name]
    source = folder = made(kind.make)
    path = source / kind.file
    whole = path.read_bytes()

    def read() -> Any:
        nonlocal folder
        if kind.writes:
            folder = tmp_path / "copy"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
        return kind.read(folder)

    before = read()
    rng, unused = random.Random(name), 0
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            found = read()
        except LongPOError as error:
            assert "\n" not in str(error)
            continue
        assert repr(found) == repr(before), f"byte {place}, bit {bit}: {whole[max(0, place - 20) : place + 20]!r}"
        unused += 1
    path.write_bytes(whole)
    assert repr(read()) == repr(before)
    assert unused <= kind.unused, f"{unused} of {FLIPS} are in bytes that nothing uses"
