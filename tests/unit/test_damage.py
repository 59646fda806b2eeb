"""Damage in the files that are read again: stages, answers, results, indices and manifests."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.checkpoint import checksums
from megatron_longpo.checkpoint.folders import folder_of
from megatron_longpo.conversion.changes import NO_CHANGES
from megatron_longpo.conversion.export_hf import export_hf
from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.conversion.verify import verify
from megatron_longpo.data.indexed import Manifest, PreferenceData, SampleWriter, _checksum, read_manifest
from megatron_longpo.data.preference import Mode
from megatron_longpo.errors import CheckpointError, DamagedError, DataError, LongPOError
from megatron_longpo.evaluation.compare import read_evaluation
from megatron_longpo.evaluation.folder import SuiteFolder, read_rows
from megatron_longpo.evaluation.report import write_report
from megatron_longpo.evaluation.results import read_results
from megatron_longpo.evaluation.suites.base import SuiteResult
from megatron_longpo.generation.merging import merge
from megatron_longpo.generation.pairs import make_part
from megatron_longpo.generation.settings import GenerationConfig, RunConfig
from megatron_longpo.generation.stages import STAGES, Stage, part_folder, read_lines
from megatron_longpo.runtime.files import FolderLock, check_checksum, sha256_of, write_checksum
from megatron_longpo.runtime.json_lines import decode_line, encode_line
from megatron_longpo.runtime.share import Share
from megatron_longpo.text.preprocess import Settings, preprocess
from megatron_longpo.training.reference import ReferenceCache
from tests.support.data import VOCABULARY, make_data, random_sample, tokenised_row, write_lines
from tests.support.models import make_model

FLIPS = 200
TEXTS = ("a tower", "Türme, 塔", 'quotes " and \\ and , "crc32": "00000000"}', "line\nfeed\t\x00", "\ud800 half")


def flips(content: bytes, count: int = FLIPS) -> Iterator[bytes]:
    """The content with one bit flipped, at random places."""
    rng = random.Random(5)
    for _ in range(count):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def test_every_flipped_bit_of_a_partial_output_is_found(tmp_path: Path) -> None:
    """Its last lines excepted that were never committed, which are written again."""
    rng = np.random.default_rng(0)

    def writer(folder: Path) -> SampleWriter:
        return SampleWriter(folder / "d", Manifest(101, "uint16", None, None, None), "one")

    begun = writer(tmp_path / "begun")
    for _ in range(4):
        begun.add(random_sample(rng, 2, context=60))
        begun.skip("no_turn", {"line": 1, "detail": "a text"})
    begun.commit({"rows": 4})
    begun.close()
    files = sorted(path for path in (tmp_path / "begun" / "d.partial").iterdir() if path.stat().st_size)
    assert [path.name for path in files] == [
        "bin",
        "documents",
        "lengths",
        "modes",
        "progress.json",
        "rejects",
        "weights",
    ]
    for file in files:
        whole, unused = file.read_bytes(), 0
        for changed in flips(whole, FLIPS if file.name in ("bin", "progress.json") else FLIPS // 8):
            file.write_bytes(changed)
            try:
                resumed = writer(tmp_path / "begun")
            except DataError as error:
                assert "start again with --restart" in str(error) and str(file) in str(error)
                continue
            # The name of the checksum itself.
            resumed.close()
            unused += 1
            assert json.loads(changed)["sizes"] == json.loads(whole)["sizes"] and file.name == "progress.json"
        assert unused < FLIPS // 5
        file.write_bytes(whole)
    resumed = writer(tmp_path / "begun")
    assert resumed.resumed and resumed.finish().samples == 4


def test_every_flipped_bit_of_merged_pairs_is_found(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [json.dumps(tokenised_row())] * 3)
    whole = path.read_bytes()
    check_checksum(path, sha256_of(path))
    write_checksum(path, sha256_of(path))
    check_checksum(path, sha256_of(path))
    assert (tmp_path / "pairs.jsonl.sha256").read_text() == f"{hashlib.sha256(whole).hexdigest()}  pairs.jsonl\n"
    for changed in flips(whole):
        path.write_bytes(changed)
        with pytest.raises(
            DataError, match=r"pairs.jsonl: does not have the checksum in pairs.jsonl.sha256, .* remove pairs"
        ):
            check_checksum(path, sha256_of(path))
    with pytest.raises(DataError, match="does not have the checksum"):
        preprocess([str(path)], str(tmp_path / "data"), Settings(vocab_size=9))
    for content in (b"", b"\xff" * 10**6, b"x  pairs.jsonl"):
        (tmp_path / "pairs.jsonl.sha256").write_bytes(content)
        with pytest.raises(DataError, match="does not have the checksum"):
            check_checksum(path, sha256_of(path))


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("one\ntwo\r\n", r"one\ntwo\r\n"),
        ("\x1b[31mred\x07 \x00", r"\x1b[31mred\x07 \x00"),
        ("a\u2028b\u202ec\ud800", r"a\u2028b\u202ec\ud800"),
        ("Türme\u00a0塔 \u3000 é", "Türme\u00a0塔 \u3000 é"),
    ],
)
def test_a_message_is_one_line_whatever_it_quotes(message: str, printed: str) -> None:
    assert str(LongPOError(message)) == printed and str(DataError(message)) == printed
    long = str(LongPOError("begin " + "x" * 10**6 + "; the fix"))
    assert (
        len(long) < 2000
        and long.startswith("begin xxx")
        and long.endswith("xxx; the fix")
        and "(998215 characters)" in long
    )


# --------------------------------------------------------------------------------------------------
# JSON lines
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_comes_back_without_its_checksum(text: str) -> None:
    row = {"key": text, "more": [1, 2.5, None]}
    raw = encode_line(row)
    assert raw.count(b"\n") == 1 and b'"crc32": "' in raw
    assert decode_line(raw) == {**row, "key": text.replace("\ud800", "?")}
    # As version 0.1.0 wrote it.
    assert decode_line(json.dumps(row).encode() + b"\n") == row


def test_every_flipped_bit_of_a_line_is_found_or_in_the_checksum() -> None:
    row = {"id": "x1", "text": "The tower. " * 20, "score": 0.5, "turns": [{"a": 1}] * 3}
    raw = encode_line(row)
    unnoticed = 0
    for changed in flips(raw):
        try:
            found = decode_line(changed)
        except ValueError:
            continue
        # The name of the checksum is damaged, and what it is about is whole.
        unnoticed += 1
        assert {k: v for k, v in found.items() if k in row} == row
    assert unnoticed < FLIPS // 10


def test_a_damaged_line_of_a_stage_is_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"number": n, "part": 0, "text": "The tower stands. " * 3} for n in range(5)]
    with Stage(tmp_path, "documents", {"seed": 1}) as stage:
        stage.append(rows)
    stage.finish()
    path = stage.path
    assert list(read_lines(path)) == rows and list(read_lines(path, 3)) == rows[3:]
    raw = path.read_bytes()
    for changed in flips(raw):
        path.write_bytes(changed)
        try:
            found = list(read_lines(path))
        except DataError as error:
            assert f"{path}: line " in str(error) and "is damaged" in str(error)
            continue
        assert [{k: row.get(k) for k in rows[0]} for row in found] == rows
    # A digit that another makes sense in its place is the damage that JSON alone does not show.
    path.write_bytes(raw.replace(b'"number": 3', b'"number": 8'))
    with pytest.raises(DataError, match=r"line 4 is damaged \(its checksum differs\); start again with --restart"):
        list(read_lines(path))
    path.write_bytes(b"[" * 10**5)
    with pytest.raises(DataError, match=r"line 1 is damaged \(is nested more than 64 levels deep\)"):
        list(read_lines(path))


def answers(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> SuiteFolder:
    folder = SuiteFolder(tmp_path / "s", {}, Share(), **settings)
    folder.add(rows)
    return folder


def row_of(number: int, score: Any = 0.5) -> dict[str, Any]:
    return {"key": f"s/t/1/{number}", "task": "t", "length": 1, "index": number, "score": score, "answer": "The tower."}


def test_damaged_answers_are_asked_again_and_logged_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = answers(tmp_path, [row_of(n) for n in range(6)])
    path = folder.parts / "0-of-1" / "answers.jsonl"
    whole = path.read_bytes()
    kept = {f"s/t/1/{n}" for n in range(6)}
    for changed in flips(whole):
        path.write_bytes(changed)
        found = list(folder.rows())
        # Whatever is found is as it was.
        assert [row["score"] for row in found] == [0.5] * len(found)
        assert {row["key"] for row in found} <= kept and len(found) >= 4
    path.write_bytes(whole.replace(b'/3"', b'/4"', 1))
    capfd.readouterr()
    folder._noted.clear()
    assert folder.answered() == folder.done() == kept - {"s/t/1/3"}
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count(
        "1 damaged line(s) do not count and are answered again (line 4: its checksum"
    ) == 1
    folder.close()


@pytest.mark.parametrize("score", [7, -0.1, "x", None, True, [], float("nan"), float("inf"), 10**400])
def test_scores_that_cannot_be_do_not_count(tmp_path: Path, score: Any) -> None:
    folder = answers(tmp_path, [row_of(0), row_of(1, score)])
    assert folder.done() == {"s/t/1/0"}
    folder.close()
    # Of a metric, such as a loss, any number is a value.
    free = answers(tmp_path, [], fractions=False)
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    assert free.done() == {"s/t/1/0"} | ({"s/t/1/1"} if is_number else set())
    free.close()


@pytest.mark.parametrize("raw", [b"[" * 10**5, b'{"key": 1, "score": 0}', b"[]", b"nonsense", b'{"key": "k"}', b"\xff"])
def test_lines_that_are_no_answers_do_not_count(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(json.dumps(row_of(0)).encode() + b"\n" + raw + b"\n" + raw)
    damaged: list[str] = []
    assert [row["key"] for row in read_rows(path, damaged=damaged)] == ["s/t/1/0"]
    assert len(damaged) == 1 and damaged[0].startswith("line 2: "), "the last line may be being written"


@pytest.mark.parametrize("torn", [1, 10, 2**16 - 1, 2**16, 2**16 + 1, 300_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path, torn: int) -> None:
    answers(tmp_path, [row_of(0), row_of(1)]).close()
    path = tmp_path / "s" / "parts" / "0-of-1" / "answers.jsonl"
    whole = path.read_bytes()
    for before in (whole, b""):
        path.write_bytes(before + b"x" * torn)
        SuiteFolder(tmp_path / "s", {}, Share()).close()
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["asked.json", "settings.json"])
@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 10**5, '{"s/t/1": 5}', '{"s/t/2": ["s/t/1/0"]}', '{"s/t/1": ["s/t/1/9"]}']
)
def test_damage_beside_the_answers_is_named(tmp_path: Path, name: str, content: str) -> None:
    answers(tmp_path, [row_of(0)]).close()
    (tmp_path / "s" / name).write_text(content)
    with pytest.raises(LongPOError, match=name if name == "asked.json" else r"settings.json|other settings"):
        SuiteFolder(tmp_path / "s", {}, Share()).write_samples(["s/u/1/0"])


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    output = tmp_path / "out"
    folder = SuiteFolder(output / "ruler", {}, Share())
    rows = [
        {**row_of(n), "key": f"ruler/niah_single_1/4096/{n}", "task": "niah_single_1", "length": 4096} for n in range(3)
    ]
    folder.add(rows)
    folder.write_samples([row["key"] for row in rows])
    folder.close()
    cell = {"score": 0.5, "samples": 3, "stderr": 0.0, "finished": 1.0, "refused": 0}
    metrics = {"tasks": {"niah_single_1": {"4096": cell}}, "lengths": {"4096": 0.5}, "average": {"score": 0.5}}
    from megatron_longpo.evaluation.results import read_or_begin, with_result, write_results
    from megatron_longpo.runtime.files import sha256_of

    content = with_result(
        read_or_begin(output), "ruler", settings={"seed": 1}, asked={"x": 3}, metrics=metrics,
        samples_sha256=sha256_of(output / "ruler" / "samples.jsonl"),
    )  # fmt: skip
    write_results(output, content)
    return output


def test_every_flipped_bit_of_the_results_is_found(evaluation: Path) -> None:
    path = evaluation / "results.json"
    before = read_results(evaluation)
    assert "sha256" not in before
    found = 0
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        try:
            content = read_results(evaluation)
        except LongPOError as error:
            assert str(path) in str(error)
            found += 1
            continue
        # White space, or the name of the checksum.
        assert {key: content[key] for key in before} == before
    assert found > 0.7 * FLIPS


def test_every_flipped_bit_of_the_samples_is_found(evaluation: Path) -> None:
    path = evaluation / "ruler" / "samples.jsonl"
    assert read_evaluation(evaluation).scores
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(LongPOError, match=r"samples.jsonl: does not have the checksum in results.json"):
            read_evaluation(evaluation)


def test_results_of_the_version_before_are_read_and_their_scores_checked(evaluation: Path) -> None:
    path, samples = evaluation / "results.json", evaluation / "ruler" / "samples.jsonl"
    content = json.loads(path.read_text())
    content.pop("sha256")
    content["suites"]["ruler"].pop("samples_sha256")
    path.write_text(json.dumps(content))
    assert read_evaluation(evaluation).scores
    whole = samples.read_text()
    for old, new in (('"score": 0.5', '"score": 7'), ('"task": "niah_single_1"', '"task": 5'), ('{"key"', '["key"')):
        samples.write_text(whole.replace(old, new, 1))
        with pytest.raises(LongPOError, match=r"samples.jsonl: .*evaluate ruler again"):
            read_evaluation(evaluation)
    for suites in ([], {"ruler": {}}, {"ruler": {"settings": [], "asked": {}, "metrics": {}}}):
        path.write_text(json.dumps({**content, "suites": suites}))
        with pytest.raises(LongPOError, match=r"results.json: is not a result of this version"):
            read_evaluation(evaluation)


# --------------------------------------------------------------------------------------------------
# Indexed binaries
# --------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<9sQBQQ")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    make_data(tmp_path / "data", samples=4)
    assert len(PreferenceData(tmp_path / "data")) == 4
    return tmp_path / "data"


def forge(prefix: Path, *, index: Callable[[bytearray], None] | None = None, **changes: Any) -> None:
    """Change the index and the manifest, and make every checksum fit."""
    idx, manifest = Path(f"{prefix}.idx"), Path(f"{prefix}.json")
    content = bytearray(idx.read_bytes())
    if index is not None:
        index(content)
    idx.write_bytes(content)
    fields = json.loads(manifest.read_text())
    fields.pop("manifest_sha256")
    digest = {name: hashlib.sha256(Path(f"{prefix}.{name}").read_bytes()).hexdigest() for name in ("bin", "idx")}
    fields |= {"idx_sha256": digest["idx"], "bin_sha256": digest["bin"], **changes}
    manifest.write_text(json.dumps({**fields, "manifest_sha256": _checksum(fields)}))


def change(name: str, place: int, value: int) -> Callable[[bytearray], None]:
    """A change of an entry of one of the index's arrays."""

    def index(content: bytearray) -> None:
        _, _, _, pieces, ends = HEADER.unpack_from(content)
        starts = {"lengths": 0, "pointers": 4 * pieces, "ends": 12 * pieces, "modes": 12 * pieces + 8 * ends}
        kinds = {"lengths": "<i", "pointers": "<q", "ends": "<q", "modes": "<b"}
        size = struct.calcsize(kinds[name])
        count = ends if name == "ends" else pieces
        struct.pack_into(kinds[name], content, HEADER.size + starts[name] + size * (place % count), value)

    return index


def all_modes(value: int) -> Callable[[bytearray], None]:
    def index(content: bytearray) -> None:
        pieces = HEADER.unpack_from(content)[3]
        content[-pieces:] = bytes([value]) * pieces

    return index


IMPLAUSIBLE = {
    "all modes 127": (all_modes(127), "piece 0 has an unknown mode"),
    "all modes 0": (all_modes(0), "sample 0 has no chosen answer"),
    "all modes context": (all_modes(3), "sample 0 has no chosen answer"),
    "all modes chosen answers": (all_modes(17), "sample 0 has no rejected answer"),
    "a negative mode": (change("modes", 1, -3), "piece 1 has an unknown mode"),
    "a mode of both rows": (change("modes", 0, 5), "piece 0 has an unknown mode"),
    "samples that begin late": (change("ends", 0, 1), "samples are not one piece after the other"),
    "samples that end early": (change("ends", -1, 3), "samples are not one piece after the other"),
    "samples outside": (change("ends", -1, 10**9), "samples are not one piece after the other"),
    "samples backwards": (change("ends", 1, 10**6), "samples are not one piece after the other"),
    "a negative end": (change("ends", 1, -1), "samples are not one piece after the other"),
    "a pointer outside": (change("pointers", 3, 10**15), "do not follow one another"),
    "a pointer into another piece": (change("pointers", 3, 0), "do not follow one another"),
    "a negative length": (change("lengths", 2, -5), "do not add up"),
    "a huge length": (change("lengths", 2, 2**31 - 1), "do not add up"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(IMPLAUSIBLE))
def test_an_implausible_index_is_refused_though_its_checksums_fit(prefix: Path, kind: str) -> None:
    index, message = IMPLAUSIBLE[kind]
    forge(prefix, index=index)
    with pytest.raises(DataError, match=rf"data.idx: .*{message}"):
        PreferenceData(prefix)


def test_headers_with_huge_counts_are_refused(prefix: Path) -> None:
    whole = Path(f"{prefix}.idx").read_bytes()
    for pieces, ends, code in (
        (2**63, 5, 8),
        (5, 2**63, 8),
        (2**64 - 1, 2**64 - 1, 8),
        (0, 0, 8),
        (0, 5, 99),
        (0, 5, 6),
    ):
        forge(prefix, index=lambda c, h=(pieces, ends, code): HEADER.pack_into(c, 0, whole[:9], 1, h[2], h[0], h[1]))  # type: ignore[misc]
        with pytest.raises(DataError, match=r"data.idx: .*preprocess the data again"):
            PreferenceData(prefix)


def test_ids_outside_the_vocabulary_are_named(prefix: Path) -> None:
    raw = np.fromfile(f"{prefix}.bin", np.uint16)
    raw[2] = VOCABULARY
    raw.tofile(f"{prefix}.bin")
    forge(prefix)
    data = PreferenceData(prefix)
    with pytest.raises(DataError, match=r"data.bin: sample 0 holds an id outside 0..\d+; preprocess the data again"):
        data[0]
    assert data[1].pieces


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -5}, {"samples": -1}, {"longest": -1}, {"tokens": 1.5}, {"tokens": True}, {"tokens": "5"},
        {"length_histogram": {"x": 1}}, {"length_histogram": {"x": "y"}}, {"length_histogram": {"512": -1}},
        {"length_histogram": {"9" * 30: 1}}, {"length_histogram": []}, {"rejected": {"a": -1}}, {"rejected": None},
        {"vocab_size": 0}, {"vocab_size": 2**40}, {"dtype": "object"}, {"dtype": "float64"}, {"dtype": "int32"},
        {"source": [[]]}, {"settings": 3}, {"bin_bytes": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_refused_though_its_checksum_fits(prefix: Path, changes: dict[str, Any]) -> None:
    forge(prefix, **changes)
    with pytest.raises(DataError, match=r"data.(json|idx): "):
        PreferenceData(prefix)


@pytest.mark.parametrize("suffix", ["json", "idx", "bin"])
def test_every_flipped_bit_of_the_binaries_is_found(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    before = read_manifest(prefix)
    for changed in flips(path.read_bytes()):
        path.write_bytes(changed)
        try:
            data = PreferenceData(prefix)
        except LongPOError:
            continue
        assert suffix == "json" and data.manifest == before, "white space of the manifest"


def test_known_modes_are_those_that_are_written(prefix: Path) -> None:
    data = PreferenceData(prefix)
    assert {Mode.RESPONSE & piece.mode for number in range(4) for piece in data[number].pieces} == {
        Mode(0),
        Mode.RESPONSE,
    }


def test_a_report_names_the_checksum_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_longpo.evaluation.report._write", lambda output, content: seen.append(content))
    seen: list[dict[str, Any]] = []
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "samples.jsonl").write_bytes(b"{}\n")
    write_report(tmp_path, "ruler", SuiteResult({}, {}, {}))
    assert seen[0]["suites"]["ruler"]["samples_sha256"] == hashlib.sha256(b"{}\n").hexdigest()


# --------------------------------------------------------------------------------------------------
# Checkpoints of a run that prove to be damaged as they are read
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a bit of a large file", "cut, without checksums", "all of them"])
def test_export_and_verify_take_the_newest_good_checkpoint_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    hf, run = tmp_path / "hf", tmp_path / "run"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_model("llama", hf, num_hidden_layers=1, **sizes)
    import_hf(hf, tmp_path / "ckpt")
    steps = [folder_of(run, step) for step in (1, 2, 3)]
    for folder in steps:
        shutil.copytree(tmp_path / "ckpt", folder)
    # As if the files were large, and hashed beside the load.
    monkeypatch.setattr(checksums, "_SMALL_BYTES", -1)
    for folder in steps if kind == "all of them" else steps[1:]:
        (path,) = folder.glob("*.distcp")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        if kind == "cut, without checksums":
            (folder / "checksums.json").unlink()
            path.write_bytes(content[: len(content) // 3])
    if kind == "all of them":
        with pytest.raises(CheckpointError, match=r"iter_0000003"):
            export_hf(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_hf(run, tmp_path / "out")
    said = "".join(capfd.readouterr())
    for folder in steps[1:]:
        assert f"{folder}: is damaged (" in said and f"passed over; {steps[0]} is used" in said
    verify(run, tmp_path / "out", changes=NO_CHANGES)
    # Asked for by name, it is that one or none.
    with pytest.raises(DamagedError, match="iter_0000003"):
        export_hf(steps[2], tmp_path / "other")


# --------------------------------------------------------------------------------------------------
# Two processes at once
# --------------------------------------------------------------------------------------------------


def test_a_part_of_an_evaluation_or_a_generation_has_one_process(tmp_path: Path) -> None:
    folder = answers(tmp_path, [row_of(0)])
    with pytest.raises(DataError, match=r"0-of-1: process \d+ on host .* works on it"):
        SuiteFolder(tmp_path / "s", {}, Share())
    # Another part is free, and sees what the first has answered.
    other = SuiteFolder(tmp_path / "s", {}, Share(1, 2))
    assert other.answered() == {"s/t/1/0"}
    other.close()
    folder.close()
    SuiteFolder(tmp_path / "s", {}, Share()).close()

    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(tokenised_row())])
    (tmp_path / "data.partial").mkdir()
    with (
        FolderLock(tmp_path / "data.partial", record=True),
        pytest.raises(DataError, match=r"data: process \d+ on host .* works on it"),
    ):
        preprocess([str(path)], tmp_path / "data", Settings(vocab_size=101))
    assert preprocess([str(path)], tmp_path / "data", Settings(vocab_size=101)).samples == 1
    assert not (tmp_path / "data.partial").exists()

    output = tmp_path / "pairs.jsonl"
    config = GenerationConfig(run=RunConfig(output=str(output)))
    part_folder(output, 0, 1).mkdir(parents=True)
    with FolderLock(part_folder(output, 0, 1), record=True), pytest.raises(DataError, match="works on it"):
        make_part(config, None, 0, 1)  # type: ignore[arg-type]


def test_parts_that_are_not_finished_are_not_merged(tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    for rank in range(2):
        folder = part_folder(output, rank, 2)
        folder.mkdir(parents=True)
        for name in STAGES:
            stage = Stage(folder, name, {})
            if rank == 0:
                stage.path.touch()
                stage.finish()
    with pytest.raises(DataError, match=r"part\(s\) 1 of 2 are not finished"):
        merge(output)
    assert not output.exists()


_HEADER = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        None,
        pickle.dumps({"a": 1}),
        _HEADER
        + (118).to_bytes(2, "little")
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 2)}".ljust(118),
        _HEADER + (118).to_bytes(2, "little") + b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 2)}".ljust(118),
        _HEADER
        + (118).to_bytes(2, "little")
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2)}".ljust(118)
        + bytes(24),
        _HEADER
        + (118).to_bytes(2, "little")
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (4, 2)}".ljust(118)
        + bytes(64),
    ],
    ids=["empty", "folder", "pickle", "14.6 TiB", "objects", "float32", "other shape"],
)
def test_caches_that_are_none_are_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    cache = ReferenceCache(tmp_path, {"weights": "w"}, 3)
    cache.path.mkdir() if content is None else cache.path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{cache.path}: (cannot be read|holds) .*; remove it to compute it again"):
        cache.read()
