"""Samples, their rows, the binaries and the order of use."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_longpo.data.indexed import Manifest, PreferenceData, SampleWriter, path_of, read_manifest
from megatron_longpo.data.preference import (
    CHOSEN_RESPONSE,
    CONTEXT,
    PROMPT,
    REJECTED_RESPONSE,
    SHORT_CHOSEN_RESPONSE,
    SHORT_PROMPT,
    SHORT_REJECTED_RESPONSE,
    BadRow,
    Mode,
    Piece,
    Sample,
    from_tokenised,
    long_rows,
    short_rows,
    weight_of,
)
from megatron_longpo.data.sampler import BatchSampler, BlendSampler, assign_batch
from megatron_longpo.errors import DataError
from megatron_longpo.runtime.files import sha256_of
from tests.support.data import make_data, random_sample, tokenised_row, write_data


def _piece(mode: Mode, *tokens: int) -> Piece:
    return Piece(np.array(tokens, np.int64), mode)


SAMPLE = Sample(
    (
        _piece(CONTEXT, 1, 2, 3),
        _piece(PROMPT, 10),
        _piece(CHOSEN_RESPONSE, 20, 21),
        _piece(REJECTED_RESPONSE, 30),
        _piece(SHORT_PROMPT, 2, 10),
        _piece(SHORT_CHOSEN_RESPONSE, 20, 21),
        _piece(SHORT_REJECTED_RESPONSE, 30),
        _piece(PROMPT, 11),
        _piece(Mode.OWN_PROMPT, 12),
        _piece(CHOSEN_RESPONSE, 40),
        _piece(REJECTED_RESPONSE, 50, 51),
        _piece(SHORT_PROMPT, 3, 11),
        _piece(SHORT_CHOSEN_RESPONSE, 40),
        _piece(SHORT_REJECTED_RESPONSE, 50, 51),
    )
)


def test_chained_rows_by_hand() -> None:
    chosen, rejected = long_rows(SAMPLE, slot=1, turns="chained", nll_scope="sequence")
    assert chosen.tokens_L.tolist() == [1, 2, 3, 10, 20, 21, 11, 40]
    assert chosen.response_L.tolist() == [-1, -1, -1, -1, 2, 2, -1, 2]
    assert chosen.nll_L.all()
    assert rejected.tokens_L.tolist() == [1, 2, 3, 10, 30, 11, 50, 51]
    assert rejected.response_L.tolist() == [-1, -1, -1, -1, 3, -1, 3, 3]
    assert not rejected.nll_L.any()


def test_independent_rows_by_hand() -> None:
    rows = long_rows(SAMPLE, slot=0, turns="independent", nll_scope="sequence")
    assert [r.tokens_L.tolist() for r in rows] == [
        [1, 2, 3, 10, 20, 21],
        [1, 2, 3, 12, 40],
        [1, 2, 3, 10, 30],
        [1, 2, 3, 12, 50, 51],
    ]
    # The document counts once in the NLL.
    assert rows[1].nll_L.tolist() == [False, False, False, True, True]


def test_short_rows_by_hand() -> None:
    assert [(r.tokens_L.tolist(), r.response_L.tolist()) for r in short_rows(SAMPLE, slot=0)] == [
        ([2, 10, 20, 21], [-1, -1, 0, 0]),
        ([2, 10, 30], [-1, -1, 1]),
        ([3, 11, 40], [-1, -1, 0]),
        ([3, 11, 50, 51], [-1, -1, 1, 1]),
    ]


def test_response_scope() -> None:
    chosen, _ = long_rows(SAMPLE, slot=0, turns="chained", nll_scope="response")
    assert chosen.nll_L.tolist() == [False] * 4 + [True, True, False, True]


def test_tokenised_schema_by_hand() -> None:
    sample = from_tokenised(tokenised_row(), 64)
    # The document once; answers stay apart although they begin alike.
    assert [(p.tokens.tolist(), p.mode) for p in sample.pieces] == [
        ([1, 2, 3], Mode.CHOSEN | Mode.REJECTED),
        ([20, 21], Mode.CHOSEN | Mode.RESPONSE),
        ([20, 31], Mode.REJECTED | Mode.RESPONSE),
        ([2, 3], Mode.SHORT_CHOSEN | Mode.SHORT_REJECTED | Mode.TURN),
        ([20, 21], Mode.SHORT_CHOSEN | Mode.RESPONSE),
        ([20, 31], Mode.SHORT_REJECTED | Mode.RESPONSE),
    ]
    rows = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")
    assert rows[0].tokens_L.tolist() == [1, 2, 3, 20, 21]


def test_lm_labels_say_what_counts_in_the_nll() -> None:
    row = {**tokenised_row(), "chosen_lm_labels": [-100, -100, 3, 20, 21, -100]}
    chosen = long_rows(from_tokenised(row, 64), slot=0, turns="chained", nll_scope="sequence")[0]
    assert chosen.nll_L.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen_labels": None}, "missing_column"),
        ({"chosen_input_ids": [1, 2, 3, 20, 21, "x"]}, "wrong_type"),
        ({"chosen_input_ids": [1, 2, 3, 20, 99, 0]}, "id_outside_vocabulary"),
        ({"chosen_labels": [-100, -100, -100, 20, 22, -100]}, "labels_differ"),
        ({"chosen_labels": [-100] * 6}, "no_response"),
        ({"chosen_labels": [-100] * 5}, "lengths_differ"),
        ({"chosen_labels": [1, -100, -100, 20, 21, -100]}, "no_prompt"),
        ({"ref_chosen_input_ids": []}, "no_turn"),
        ({"ref_rejected_labels": []}, "turns_differ"),
        ({"ref_chosen_input_ids": [1, 2]}, "wrong_type"),
        ({"chosen_input_ids": [1.5] * 6}, "wrong_type"),
    ],
)
def test_bad_tokenised_rows_have_a_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        from_tokenised({**tokenised_row(), **change}, 64)
    assert caught.value.reason == reason


def test_megatron_reads_the_binaries(tmp_path: Path) -> None:
    prefix = make_data(tmp_path / "data", 5)
    rng = np.random.default_rng(0)
    expected = [random_sample(rng, 1 + i % 3, context=int(rng.integers(40, 150))) for i in range(5)]
    theirs = IndexedDataset(str(prefix), multimodal=True)
    ours = PreferenceData(prefix)
    assert len(theirs.document_indices) - 1 == len(ours) == 5
    place = 0
    for number, sample in enumerate(expected):
        for piece, read in zip(sample.pieces, ours[number].pieces, strict=True):
            tokens, mode = theirs[place]
            assert tokens.tolist() == piece.tokens.tolist() == read.tokens.tolist()
            assert mode == int(piece.mode) == int(read.mode)
            place += 1
    assert ours.long_lengths().tolist() == [s.long_length for s in expected]
    manifest = read_manifest(prefix)
    assert manifest.samples == 5 and manifest.turns == sum(s.turns for s in expected)
    assert manifest.longest == max(s.long_length for s in expected)
    assert sum(manifest.length_histogram.values()) == 5


def test_the_document_is_stored_once() -> None:
    sample = random_sample(np.random.default_rng(0), 3, context=1000)
    stored = sum(len(p.tokens) for p in sample.pieces if p.mode & (Mode.CHOSEN | Mode.REJECTED))
    rows = long_rows(sample, slot=0, turns="chained", nll_scope="sequence")
    assert stored < 1300 < sum(len(r.tokens_L) for r in rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_writer_broken_off_goes_on(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Dropped anywhere, with a tail that was never committed: the same files as without a break."""
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    samples = [random_sample(rng, 1, context=20) for _ in range(8)]
    folder = tmp_path_factory.mktemp("writer")

    def manifest() -> Manifest:
        return Manifest(101, "uint16", None, None, None)

    def write(prefix: Path, breaks: list[int]) -> None:
        while True:
            writer = SampleWriter(prefix, manifest(), "same")
            start = writer.position.get("rows", 0)
            stop = breaks.pop(0) if breaks else None
            for number in range(start, len(samples)):
                writer.add(samples[number])
                if number % 3 == 2:
                    writer.skip("odd", {"line": number})
                    writer.commit({"rows": number + 1})
                if number == stop:
                    for stream in writer._files.values():
                        stream.flush()
                    writer.close()
                    break
            else:
                writer.commit({"rows": len(samples)})
                writer.finish()
                return

    write(folder / "whole", [])
    write(folder / "broken", data.draw(st.lists(st.integers(0, 7), max_size=4)))
    for suffix in ("bin", "idx", "json", "rejects.jsonl"):
        assert path_of(folder / "whole", suffix).read_bytes() == path_of(folder / "broken", suffix).read_bytes()
    assert not path_of(folder / "broken", "partial").exists()


def test_weights_travel_beside_the_binaries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [1.0, 0.0, 2.5]
    samples = [dataclasses.replace(random_sample(rng, 1, context=30), weight=w) for w in weights]
    write_data(tmp_path / "weighted", samples)
    data = PreferenceData(tmp_path / "weighted")
    assert data.weights.tolist() == weights and [data[i].weight for i in range(3)] == weights
    assert data.manifest.weights_sha256 == sha256_of(tmp_path / "weighted.weights.npy")
    np.save(tmp_path / "weighted.weights.npy", np.ones(3))
    with pytest.raises(DataError, match=r"weighted\.weights\.npy: does not have the checksum"):
        PreferenceData(tmp_path / "weighted")
    (tmp_path / "weighted.weights.npy").unlink()
    with pytest.raises(DataError, match=r"weighted\.weights\.npy: cannot be read"):
        PreferenceData(tmp_path / "weighted")
    write_data(tmp_path / "nothing", [dataclasses.replace(sample, weight=0.0) for sample in samples])
    with pytest.raises(DataError, match="all weights are 0"):
        PreferenceData(tmp_path / "nothing")
    # All of them 1: no file.
    write_data(tmp_path / "plain", [dataclasses.replace(sample, weight=1.0) for sample in samples])
    assert not (tmp_path / "plain.weights.npy").exists()
    assert read_manifest(tmp_path / "plain").weights_sha256 == ""
    assert PreferenceData(tmp_path / "plain")[2].weight == 1


def test_manifests_together() -> None:
    parts = [
        Manifest(101, "uint16", "t", "h", "c", samples=n, turns=2 * n, tokens=9 * n, longest=n, bin_sha256=f"{n}")
        for n in (3, 5)
    ]
    parts[0].length_histogram, parts[1].length_histogram = {"512": 3}, {"512": 4, "1024": 1}
    parts[0].skip_reasons = {"no_turn": 2}
    both = Manifest.combined(parts, [0.7, 0.3])
    assert (both.samples, both.turns, both.tokens, both.longest) == (8, 16, 72, 5)
    assert both.length_histogram == {"512": 7, "1024": 1} and both.skip_reasons == {"no_turn": 2}
    assert Manifest.combined(parts[:1], [None]) is parts[0]
    # What was tokenised already names no template; the other does.
    tokenised = Manifest(101, "uint16", None, None, None, samples=1)
    assert Manifest.combined([tokenised, parts[0]], [1.0, 1.0]).template_hash == "c"
    # One checksum for data, order and weights.
    others = [Manifest.combined(parts, [0.6, 0.4]), Manifest.combined(parts[::-1], [0.3, 0.7])]
    assert len({m.bin_sha256 for m in (both, *others)}) == 3


def test_a_partial_output_without_weights_goes_on(tmp_path: Path) -> None:
    """As an earlier commit left it."""
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, 1, context=30) for _ in range(3)]
    writer = SampleWriter(tmp_path / "d", Manifest(101, "uint16", None, None, None), "one")
    writer.add(samples[0])
    writer.commit({"rows": 1})
    writer.close()
    progress = json.loads((tmp_path / "d.partial" / "progress.json").read_bytes())
    del progress["sizes"]["weights"], progress["crc32"], progress["progress_sha256"]
    (tmp_path / "d.partial" / "progress.json").write_text(json.dumps(progress))
    (tmp_path / "d.partial" / "weights").unlink()
    writer = SampleWriter(tmp_path / "d", Manifest(101, "uint16", None, None, None), "one")
    writer.add(dataclasses.replace(samples[1], weight=0.5))
    writer.add(samples[2])
    writer.finish()
    assert PreferenceData(tmp_path / "d").weights.tolist() == [1, 0.5, 1]


@pytest.mark.parametrize("weight", [-1, True, "2", float("nan"), float("inf"), [1]])
def test_a_weight_is_a_finite_number(weight: object) -> None:
    assert (weight_of({}), weight_of({"weight": None}), weight_of({"weight": 2})) == (1.0, 1.0, 2.0)
    with pytest.raises(BadRow, match="finite number of at least 0"):
        weight_of({"weight": weight})


def test_a_partial_output_of_other_settings_is_refused(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "d", Manifest(101, "uint16", None, None, None), "one")
    writer.commit({"rows": 0})
    writer.close()
    with pytest.raises(DataError, match="--restart"):
        SampleWriter(tmp_path / "d", Manifest(101, "uint16", None, None, None), "two")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("good") / "data", 6)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["bin", "idx", "json"]),
    damage=st.sampled_from(["truncate", "flip", "append", "empty", "remove", "replace"]),
    place=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=40),
)
def test_damaged_files_are_refused_by_name(
    good: Path, tmp_path_factory: pytest.TempPathFactory, suffix: str, damage: str, place: float, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for s in ("bin", "idx", "json"):
        shutil.copyfile(path_of(good, s), path_of(folder / "data", s))
    path = path_of(folder / "data", suffix)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    before = bytes(content)
    if damage == "truncate":
        content = content[:at]
    elif damage == "flip":
        content[at] ^= 1 << random.Random(at).randrange(8)
    elif damage == "append":
        content += junk
    elif damage == "empty":
        content = bytearray()
    elif damage == "replace":
        content = bytearray(junk)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        data = PreferenceData(folder / "data")
    except DataError as error:
        assert f"data.{suffix}" in str(error) or suffix == "json"
    else:
        # White space of the manifest, changed, changes nothing that it says.
        assert suffix == "json"
        old = json.loads(before)
        old.pop("manifest_sha256")
        assert data.manifest.as_dict() == old


def test_a_missing_manifest_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preprocess_preference_data"):
        PreferenceData(tmp_path / "nothing")


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 10), min_size=4, max_size=4),
    batch=st.integers(1, 16),
    shuffle=st.booleans(),
)
def test_a_blend_keeps_its_proportions(sizes: list[int], weights: list[float], batch: int, shuffle: bool) -> None:
    def blend() -> BlendSampler:
        return BlendSampler(sizes, weights[: len(sizes)], batch, shuffle=shuffle, seed=3)

    sampler = blend()
    used = [i for step in range(20) for i in sampler.batch(step)]
    # Any step can be asked for first: resuming needs no state.
    assert blend().batch(13) == used[13 * batch : 14 * batch]
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, used, side="right")
    shares = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    for uses in range(1, len(used) + 1):
        counts = np.bincount(parts[:uses], minlength=len(sizes))
        # Never further from its share than there are other data sets that may be ahead.
        assert (abs(counts - shares * uses) < len(sizes)).all()
    for part, size in enumerate(sizes):
        mine = [i - (ends[part] - size) for i, p in zip(used, parts, strict=True) if p == part]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size))


def test_a_blend_by_hand() -> None:
    sampler = BlendSampler([2, 100], [3, 1], 4, shuffle=False, seed=0)
    # Every batch has three of the first, whose two samples come again and again, and one of the second.
    assert [sorted(sampler.batch(step)) for step in range(3)] == [[0, 0, 1, 2], [0, 1, 1, 3], [0, 0, 1, 4]]
    # Beyond the first table.
    assert sorted(sampler.batch(5000))[-1] == 2 + 5000 % 100
    # Each data set has permutations of its own, the first one those that it has alone.
    both = BlendSampler([8, 8], [1, 1], 16, shuffle=True, seed=5).batch(0)
    mine = [i for i in both if i < 8]
    assert mine == BatchSampler(8, 8, shuffle=True, seed=5).batch(0)
    assert mine != [i - 8 for i in both if i >= 8]


@given(st.integers(1, 40), st.integers(1, 16), st.booleans(), st.integers(0, 5))
def test_every_sample_once_an_epoch(samples: int, batch: int, shuffle: bool, seed: int) -> None:
    sampler = BatchSampler(samples, batch, shuffle=shuffle, seed=seed)
    used = [i for step in range(samples) for i in sampler.batch(step)]
    for epoch in range(batch):
        assert sorted(used[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    # Any step can be asked for first: resuming needs no state.
    fresh = BatchSampler(samples, batch, shuffle=shuffle, seed=seed)
    assert fresh.batch(samples - 1) == sampler.batch(samples - 1)
    if not shuffle:
        assert used[: min(batch, samples)] == list(range(min(batch, samples)))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_ranks_share_a_batch_without_overlap(data_size: int, micro: int, rounds: int, data: st.DataObject) -> None:
    size = data_size * micro * rounds
    costs = data.draw(st.lists(st.floats(1, 1000), min_size=size, max_size=size))
    assigned = assign_batch(costs, data_size=data_size, micro_batch_size=micro)
    assert sorted(i for rank in assigned for m in rank for i in m) == list(range(size))
    assert all(len(rank) == rounds and all(len(m) == micro for m in rank) for rank in assigned)


def test_ranks_finish_together() -> None:
    """64 rows of lognormal lengths over 4 ranks with 16 steps each: far better than assigned in order."""
    rng = np.random.default_rng(0)
    costs = (rng.lognormal(9, 0.8, 64) ** 1.5).tolist()
    loads = [sum(costs[i] for m in rank for i in m) for rank in assign_batch(costs, data_size=4, micro_batch_size=1)]
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_reasons_for_skipping_have_their_old_name_in_files(tmp_path: Path) -> None:
    """Files of release 0.1.0 are read, and files of this one by it."""
    manifest = Manifest(101, "uint16", None, None, None, samples=1, skip_reasons={"not_json": 2})
    path_of(tmp_path / "data", "json").write_bytes(manifest.as_json())
    assert json.loads(path_of(tmp_path / "data", "json").read_text())["rejected"] == {"not_json": 2}
    assert read_manifest(tmp_path / "data") == manifest
    assert Manifest.from_dict(manifest.as_dict(), where="", fix="") == manifest
