"""Runs, comparisons and settings of evaluation, without a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.engines.base import Reply
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import compare, report
from megatron_longpo.evaluation.folder import SuiteFolder, read_rows
from megatron_longpo.evaluation.metrics import missing_answers, score_of
from megatron_longpo.evaluation.registry import SUITES
from megatron_longpo.evaluation.results import read_results
from megatron_longpo.evaluation.runner import (
    Answered,
    SampleBatch,
    assign_batches,
    row_of,
    run,
    sample_batches,
    samples_per_batch,
)
from megatron_longpo.evaluation.samples import EvalSample
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from megatron_longpo.evaluation.suites.base import Cell, SuiteResult
from megatron_longpo.runtime.share import Share
from megatron_longpo.training import held_out
from megatron_longpo.training.metrics import (
    REPORTED,
    REPORTED_WITHOUT_PREFERENCE,
    REPORTED_WITHOUT_REFERENCE,
    validation_line,
)


def _rows(batch: SampleBatch, done: set[str]) -> Any:
    for key in batch.keys:
        if key not in done:
            yield Answered([{"key": key, "task": "t", "length": 1, "index": 0, "score": 1.0}], tokens=1)


def test_results_go_on_after_a_torn_line_whatever_the_split(tmp_path: Path) -> None:
    batches = [SampleBatch((f"s/t/1/{2 * i}", f"s/t/1/{2 * i + 1}"), float(i), list) for i in range(5)]
    first = SuiteFolder(tmp_path / "s", {"seed": 1}, Share(1, 3))
    # A part that was started by itself does not wait for the others.
    assert run("s", batches, _rows, first) is None
    first.close()
    path = tmp_path / "s" / "parts" / "1-of-3" / "answers.jsonl"
    done = {r["key"] for r in read_rows(path)}
    assert 0 < len(done) < 10
    content = path.read_text()
    path.write_text(content[:-7])
    again = SuiteFolder(tmp_path / "s", {"seed": 1}, Share(0, 1))
    rows = run("s", batches, _rows, again)
    again.close()
    assert rows is not None and [r["key"] for r in rows] == [f"s/t/1/{i}" for i in range(10)]
    assert len((tmp_path / "s" / "samples.jsonl").read_text().splitlines()) == 10
    # Fewer samples of a cell that is asked again; another cell that was finished stays, one that was begun does not.
    fewer = SuiteFolder(tmp_path / "s", {"seed": 1}, Share(0, 1))
    other = [SampleBatch(("s/u/1/0",), 1.0, list)]
    run("s", other, _rows, fewer)
    fewer.add([{"key": "s/v/1/0", "task": "v", "length": 1, "index": 0, "score": 0.0}])
    rows = run("s", batches[:2], _rows, fewer)
    fewer.close()
    assert rows is not None and {r["key"] for r in rows} == {*(f"s/t/1/{i}" for i in range(4)), "s/u/1/0"}
    # What a task is made of may be added, not changed.
    by_task = {"seed": 1, "materials": {"haystack": "x", "squad": None}}
    one = tmp_path / "by_task"
    SuiteFolder(one, by_task, Share(), by_task=["materials"]).close()
    added = SuiteFolder(one, {"seed": 1, "materials": {"haystack": None, "squad": "y"}}, Share(), by_task=["materials"])
    added.close()
    assert added.settings == {"seed": 1, "materials": {"haystack": "x", "squad": "y"}}
    with pytest.raises(ConfigError, match=r'\(materials.haystack was "x" and is "z"\)'):
        SuiteFolder(one, {"seed": 1, "materials": {"haystack": "z"}}, Share(), by_task=["materials"])
    with pytest.raises(ConfigError, match=r"seed was 1 and is 2.*--restart"):
        SuiteFolder(tmp_path / "s", {"seed": 2}, Share())
    SuiteFolder(tmp_path / "s", {"seed": 2}, Share(), restart=True).close()
    assert not (tmp_path / "s" / "samples.jsonl").exists()


def test_what_was_refused_is_asked_again(tmp_path: Path) -> None:
    """And a later answer counts, in whichever part it is."""

    def refuse(batch: SampleBatch, done: set[str]) -> Any:
        rows = [{"key": k, "task": "t", "length": 1, "index": 0, "score": 0.0, "refused": True} for k in batch.keys]
        yield Answered([r for r in rows if r["key"] not in done], tokens=1)

    batches = [SampleBatch(("s/t/1/0", "s/t/1/1"), 1.0, list)]
    for share, answer, score in ((Share(), refuse, 0.0), (Share(0, 1), _rows, 1.0), (Share(0, 1), refuse, 1.0)):
        results = SuiteFolder(tmp_path / "s", {}, share)
        rows = run("s", batches, answer, results)
        results.close()
        assert rows is not None and [r["score"] for r in rows] == [score, score]
    moved = tmp_path / "s" / "parts" / "9-of-9"
    moved.mkdir()
    lines = (tmp_path / "s" / "parts" / "0-of-1" / "answers.jsonl").read_text().splitlines(keepends=True)
    (moved / "answers.jsonl").write_text("".join(lines[:2]))
    results = SuiteFolder(tmp_path / "s", {}, Share())
    rows = run("s", batches, _rows, results)
    assert rows is not None and [r["score"] for r in rows] == [1.0, 1.0]


def test_processes_that_do_not_share_a_folder_are_told(tmp_path: Path) -> None:
    results = SuiteFolder(tmp_path / "s", {}, Share(0, 2, "torchrun"))
    with pytest.raises(
        DataError, match=r"1 of 2 processes have no folder there \(1-of-2, ...\) after 0 s; name an --output"
    ):
        results.wait_for_parts(patience=0.3)
    other = SuiteFolder(tmp_path / "s", {}, Share(1, 2, "torchrun"))
    results.wait_for_parts(patience=0.3)
    for one in (results, other):
        one.close()


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30), st.integers(1, 5))
def test_batches_are_assigned_once_and_evenly(costs: list[float], ranks: int) -> None:
    batches = [SampleBatch((str(i),), c, list) for i, c in enumerate(costs)]
    assigned = assign_batches(batches, ranks)
    assert sorted(int(w.keys[0]) for mine in assigned for w in mine) == list(range(len(costs)))
    loads = [sum(w.cost for w in mine) for mine in assigned]
    assert max(loads) <= sum(costs) / ranks + max(costs) + 1e-9


def _evaluation(name: str, scores: dict[int, float], digest: str = "d") -> compare.Evaluation:
    answers = {f"ruler/vt/1/{i}": compare.QuestionScore(s, f"{digest}{i}") for i, s in scores.items()}
    return compare.Evaluation(name, {"ruler": {Cell("vt", "1"): answers}})


@pytest.mark.parametrize(
    ("samples", "world_size", "at_once", "size"),
    [
        (260, 1, 4, 32),  # one process: as much in common as can be
        (260, 2, 4, 16),  # 130 each: eight batches of 16
        (260, 64, 1, 1),  # 5 each
        (260, 64, 64, 5),  # an engine that answers many at once gets all its samples together
        (6500, 8, 64, 64),
        (3, 8, 4, 1),
    ],
)
def test_size_of_batches_by_hand(samples: int, world_size: int, at_once: int, size: int) -> None:
    assert samples_per_batch(samples, world_size, at_once) == size


@settings(max_examples=200, deadline=None)
@given(
    cells=st.integers(1, 30),
    samples=st.integers(1, 120),
    world_size=st.integers(1, 70),
    at_once=st.integers(1, 8),
)
def test_many_processes_share_few_samples(cells: int, samples: int, world_size: int, at_once: int) -> None:
    size = samples_per_batch(cells * samples, world_size, at_once)
    batches = [
        w
        for cell in range(cells)
        for w in sample_batches("ruler", f"t{cell}", 1024, count=samples, size=size, make=lambda i: i)
    ]  # type: ignore[arg-type, return-value]
    assert [k for w in batches for k in w.keys] == [
        f"ruler/t{c}/1024/{i}" for c in range(cells) for i in range(samples)
    ]
    assert [i for w in batches[:1] for [i] in w.make()] == list(range(len(batches[0].keys)))
    assert max(len(w.keys) for w in batches) <= size
    loads = [sum(len(w.keys) for w in mine) for mine in assign_batches(batches, world_size)]
    mean = cells * samples / world_size
    # Beyond the mean no more than a batch or an eighth (of a share rounded up).
    assert max(loads) <= mean + max(at_once, (mean + 1) / 8, 1)


@pytest.mark.parametrize(
    ("suite", "first", "other", "message"),
    [
        (
            "ruler",
            {"version": {"vt": 1, "cwe": 1}},
            {"version": {"vt": 1, "cwe": 2}},
            "ruler of a has version of cwe 1 and that of b 2",
        ),
        ("needle", {"version": 1}, {"version": 2}, "needle of a has version 1 and that of b 2"),
        (
            "preference",
            {"reference": "x", "beta": 0.1},
            {"reference": "y", "beta": 0.1},
            "preference of a has reference x and that of b y",
        ),
        ("short", {"shots": {"mmlu": 5}}, {"shots": {"mmlu": 4}}, "short of a has shots of mmlu 5 and that of b 4"),
        ("infinitebench", {"prompts": "chat"}, {"prompts": "base"}, "infinitebench of a has prompts chat"),
        ("needle", {"depths": 11}, {"depths": 5}, "needle of a has depths 11 and that of b 5"),
        ("ruler", {"version": {"vt": 1}, "seed": 1}, {"version": {"cwe": 2}, "seed": 2}, None),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(
    suite: str, first: dict[str, Any], other: dict[str, Any], message: str | None
) -> None:
    a, b = (compare.Evaluation(name, {}, {suite: s}) for name, s in (("a", first), ("b", other)))
    if message is None:
        compare.check_alike(a, b)
    else:
        with pytest.raises(ConfigError, match=message):
            compare.check_alike(a, b)


def test_a_report_that_lost_its_answers_is_not_compared(tmp_path: Path) -> None:
    metrics = {"depths": {"0": {"1": {"score": 1.0, "stderr": None, "samples": 1}}}, "average": {"score": 1.0}}
    report.write_report(tmp_path, "needle", SuiteResult(settings={}, asked={}, metrics=metrics))
    with pytest.raises(ConfigError, match=r"needle/samples\.jsonl: has no answers; evaluate needle again"):
        compare.read_evaluation(tmp_path)
    # Started over, it is not reported until it is done.
    report.remove_from_report(tmp_path, ["needle"])
    assert read_results(tmp_path)["suites"] == {}
    with pytest.raises(ConfigError, match="reports no suite"):
        compare.read_evaluation(tmp_path)


def test_comparison_pairs_what_is_the_same() -> None:
    rng = np.random.default_rng(0)
    hard = {i: float(x) for i, x in enumerate(rng.random(60))}
    better = {i: min(1.0, s + 0.05) for i, s in hard.items()}
    (paired,) = [d for d in compare.compare([_evaluation("a", hard), _evaluation("b", better)]) if d.name == "vt"]
    (unpaired,) = [
        d for d in compare.compare([_evaluation("a", hard), _evaluation("b", better, "other")]) if d.name == "vt"
    ]
    # A small change that is the same for every question shows only in pairs.
    assert paired.paired and paired.is_clear and paired.low > 0.03 and paired.high < 0.051
    assert not unpaired.paired and not unpaired.is_clear and unpaired.high - unpaired.low > 0.1
    assert paired.other_mean - paired.first_mean == pytest.approx(unpaired.other_mean - unpaired.first_mean)
    # A few questions in common are no ground for leaving out the others.
    mixed = {
        key: compare.QuestionScore(answer.score, f"d{i}" if i < 3 else f"x{i}")
        for i, (key, answer) in enumerate(_evaluation("b", better).scores["ruler"][Cell("vt", "1")].items())
    }
    (partly,) = [
        d
        for d in compare.compare([_evaluation("a", hard), compare.Evaluation("b", {"ruler": {Cell("vt", "1"): mixed}})])
        if d.name == "vt"
    ]
    assert not partly.paired and partly.samples == 60
    (single,) = [d for d in compare.compare([_evaluation("a", {0: 0.0}), _evaluation("b", {0: 1.0})]) if d.name == "vt"]
    assert not single.is_clear
    (same,) = [d for d in compare.compare([_evaluation("a", hard), _evaluation("b", hard)]) if d.name == "vt"]
    assert same.low == same.high == 0 and not same.is_clear


# --------------------------------------------------------------------------------------------------
# Samples without an answer
# --------------------------------------------------------------------------------------------------

REPLIES = [
    Reply("Ann", True, 5, 1),
    Reply("Bob", False, 5, 1),
    Reply("", False, 5, 0, refused="too long"),
    Reply("", True, 5, 0),
    Reply("", False, 5, 9, thinking_tokens=9),
    Reply("Ann", False, 5, 1, declined="content filter"),
]


def _answered(replies: Sequence[Reply], folder: Path) -> SuiteResult:
    """Results of RULER's vt with these replies, the answer being Ann."""
    samples = [
        EvalSample(
            suite="ruler",
            task="vt",
            length=1024,
            index=i,
            message=str(i),
            prefix="",
            references=("Ann",),
            scorer="string_match_all",
            max_tokens=9,
        )
        for i in range(len(replies))
    ]
    rows = [row_of(sample, reply, 0.1) for sample, reply in zip(samples, replies, strict=True)]
    suite_folder = SuiteFolder(folder / "ruler", {}, Share())
    suite_folder.add(rows)
    suite_folder.write_samples([row["key"] for row in rows])
    suite_folder.close()
    result = SuiteResult({}, {"ruler/vt/1024": len(rows)}, SUITES["ruler"].metrics(rows))  # type: ignore[attr-defined]
    report.write_report(folder, "ruler", result)
    return result


def test_what_is_no_answer_is_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six samples: one right and one wrong answer, four that are none."""
    result = _answered(REPLIES, tmp_path / "a")
    cell = result.metrics["tasks"]["vt"]["1024"]
    assert cell["score"] == pytest.approx(1 / 6) and cell["score_of_answers"] == 0.5
    assert cell["no_answer"] == {"refused": 1, "empty": 1, "only_thinking": 1, "declined": 1} and cell["refused"] == 1
    # The one answer that was cut; thinking and refusals are counted above.
    assert cell["unfinished"] == 1
    written = (tmp_path / "a" / "report.md").read_text()
    words = "1 refused by the engine, 1 empty, 1 only thinking, 1 declined by the server or the model"
    assert f"4 samples have no answer and count as wrong: {words}." in written
    assert "| vt | 1024 | 6 | 4 | 16.7 | 50.0 |" in written
    assert "1 answers were cut at their limit of tokens and scored as far as they went." in written
    report.print_result("ruler", result)
    assert f"ruler: 4 samples have no answer and count as wrong: {words}" in " ".join(capsys.readouterr().out.split())
    rows = list(read_rows(tmp_path / "a" / "ruler" / "samples.jsonl"))
    assert [row.get("no_answer") for row in rows] == [None, None, "refused", "empty", "only_thinking", "declined"]
    assert [row["score"] for row in rows] == [1, 0, 0, 0, 0, 0] and rows[4]["thinking_tokens"] == 9
    # Compared with an evaluation in which all samples have answers.
    _answered([Reply("Ann", True, 5, 1)] * 6, tmp_path / "b")
    (line, *_) = compare.write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (line.first_no_answer, line.other_no_answer) == (4, 0)
    table = (tmp_path / "c" / "comparison.md").read_text()
    assert "| no answer: first, other |" in table and "| 4, 0 |" in table
    assert "Questions without an answer count as wrong." in table
    compare.write_comparison([tmp_path / "b", tmp_path / "b"], tmp_path / "d")
    assert "no answer" not in (tmp_path / "d" / "comparison.md").read_text()


def test_rows_of_version_0_1_say_what_was_no_answer() -> None:
    row = {"key": "k", "score": 0.0, "answer": "", "refused": "too long", "finished": False}
    assert score_of([{**row}, {**row, "refused": None}])["no_answer"] == {"refused": 1, "empty": 1}  # type: ignore[list-item]
    assert missing_answers([{"score": 0, "stderr": None, "samples": 9, "refused": 2}]) == {"refused": 2}


@settings(deadline=None, max_examples=20)
@given(st.integers(20, 200), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_intervals_cover_as_the_normal_ones_do(n: int, p: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(n), rng.random(n) + p
    found = compare.bootstrap([compare.Stratum(a, b, paired=False)], rng)
    half = 1.96 * np.sqrt(a.var() / n + b.var() / n)
    assert found.low < found.other_mean - found.first_mean < found.high
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.2)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (REPORTED, "acc 0.50 | kl per token +0.0000"),
        (REPORTED_WITHOUT_REFERENCE, "acc 0.50 | 2 samples"),
        (REPORTED_WITHOUT_PREFERENCE, "nll 1.0000 | 2 samples"),
    ],
)
def test_a_summary_has_what_the_objective_has(names: tuple[str, ...], shown: str) -> None:
    table = {name: np.ones(2) for name in held_out.METRICS} | {"rewards/accuracies": np.array([0.0, 1.0])}
    found = held_out.summary(table, names)
    assert set(found) == {"samples", "by_length", *names} and set(found["by_length"]["1"]) == {"samples", *names}
    assert shown in validation_line(found)


def test_preference_summary_by_hand() -> None:
    table = {name: np.zeros(3) for name in held_out.METRICS}

    def put(row: int, **values: float) -> None:
        for name, value in values.items():
            table[name.replace("__", "/")][row] = value

    for row, tokens in enumerate((100, 128, 129)):
        put(row, tokens=tokens, nll=row, response_tokens__chosen=4, response_tokens__rejected=5)
        put(row, logps__chosen=-12, ref__chosen=-8, logps__rejected=-10, ref__rejected=-20, rewards__margins=row - 1)
    found = held_out.summary(table)
    assert found["samples"] == 3 and found["nll"] == 1 and found["kl/chosen"] == 1 and found["kl/rejected"] == 2
    assert {b: of["samples"] for b, of in found["by_length"].items()} == {"128": 2, "256": 1}
    assert found["by_length"]["128"]["nll"] == 0.5 and found["by_length"]["256"]["rewards/margins"] == 1
    assert held_out.length_bin(1) == 1 and held_out.length_bin(129) == 256


def test_configuration_errors_name_the_fix() -> None:
    from megatron_longpo.config import from_dict

    good = {"evaluate": {"output": "o", "tasks": ["ruler,needle"], "lengths": ["4K,8192"]}, "engine": {"model": "m"}}
    config = from_dict(good, "x", EvaluationConfig)
    check(config)
    assert config.suites == ["ruler", "needle"] and config.lengths == [4096, 8192]
    numbers = from_dict({**good, "evaluate": {**good["evaluate"], "lengths": [8192, 1024]}}, "x", EvaluationConfig)
    assert numbers.lengths == [1024, 8192]
    for section, values, message in [
        ("evaluate", {"output": None}, "--output"),
        ("evaluate", {"tasks": ["rulers"]}, "tasks has 'rulers'; use ruler, "),
        ("evaluate", {"lengths": ["4M"]}, "write 4096 or 4K"),
        ("evaluate", {"tasks": ["infinitebench"]}, "--infinitebench"),
        ("evaluate", {"tasks": ["preference"]}, "--pairs"),
        ("evaluate", {"samples": 0}, "samples=0"),
        ("ruler", {"ruler_tasks": ["niah"]}, "ruler_tasks has 'niah'"),
        ("engine", {"model": None}, "--model"),
        ("engine", {"engine": "openai"}, "tokenizer"),
        ("evaluate", {"rank": 1}, "belong together"),
    ]:
        broken = {**good, section: {**good.get(section, {}), **values}}
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(from_dict(broken, "x", EvaluationConfig))
    openai = {**good, "engine": {"engine": "openai", "model": "m", "tokenizer": "t"}}
    openai["evaluate"] = {**good["evaluate"], "tasks": ["short"]}
    with pytest.raises(ConfigError, match="log-probs of given text"):
        check(from_dict(openai, "x", EvaluationConfig))
