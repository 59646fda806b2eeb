"""Evaluation by the command line: all suites on a tiny model, kills, splits, a server, local data, comparisons."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.conversion.import_hf import import_hf
from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.compare import write_comparison
from megatron_longpo.evaluation.suites.short_context import load_tasks
from tests.support.data import make_data
from tests.support.flaky_proxy import FlakyProxy
from tests.support.launch import Running, command, environment, run, torchrun
from tests.support.models import make_chat_model, make_model
from tests.support.tokenizers import WORDS, make_fast_tokenizer, prompt_counter

TOOL = [sys.executable, "tools/evaluate.py"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny chat models of random weights, texts, questions and books."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, std in (("model", 0.15), ("other", 0.16)):
        make_fast_tokenizer(folder / name)
        make_chat_model(folder / name, std)
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, 12))).capitalize() + "."

    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(sentence() for _ in range(400)))
    paragraphs = [" ".join(sentence() for _ in range(3)) for _ in range(40)]
    squad = [
        {"title": f"t{i % 5}", "context": p, "question": f"What of {i}?", "answers": {"text": [f"a{i}"]}}
        for i, p in enumerate(paragraphs)
    ]
    (folder / "squad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in squad))
    hotpot = [
        {
            "question": f"Who of {i}?",
            "answer": f"n{i}",
            "supporting_facts": [[f"t{i}", 0]],
            "context": [[f"t{j}", [paragraphs[j % 40]]] for j in range(i, i + 4)],
        }
        for i in range(12)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    books = folder / "infinitebench"
    books.mkdir()
    book = " ".join(sentence() for _ in range(300))
    options = ["the tower", "the river", "the bank", "the view"]
    for task, row in (
        ("longbook_sum_eng", {"answer": [sentence()]}),
        ("longbook_qa_eng", {"input": "Who climbs?", "answer": ["people", "most people"]}),
        ("longbook_choice_eng", {"input": "What stands?", "answer": ["the tower"], "options": options}),
    ):
        rows = [json.dumps({"id": i, "context": f"{i} {book}", **row}) for i in range(2)]
        (books / f"{task}.jsonl").write_text("\n".join([rows[0], "{broken", rows[1]]) + "\n")
    return folder


def arguments(made: Path, output: Path, model: str = "model", samples: int = 2) -> list[str]:
    return [
        *("--model", str(made / model), "--dtype", "float32", "--output", str(output)),
        *(
            "--haystack",
            str(made / "texts"),
            "--squad",
            str(made / "squad.jsonl"),
            "--hotpotqa",
            str(made / "hotpot.json"),
        ),
        *("--infinitebench", str(made / "infinitebench"), "--samples", str(samples), "--lengths", "2200,3K"),
        *("--needle-depths", "4", "--needle-trials", "2"),
    ]


TASKS = ("--ruler-tasks", "niah_single_1,niah_single_2,niah_multivalue,vt,qa_1,qa_2")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(folder: Path) -> dict[str, tuple[str, float]]:
    return {r["key"]: (r["answer"], r["score"]) for r in rows(folder / "samples.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(made: Path) -> Path:
    """Three suites in one go by one process."""
    output = made / "before"
    run([*TOOL, *arguments(made, output), *TASKS, "--tasks", "ruler,needle,infinitebench"], fresh=True)
    return output


def test_everything_is_written(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    assert set(results["suites"]) == {"ruler", "needle", "infinitebench"}
    ruler = results["suites"]["ruler"]
    assert (
        ruler["settings"]["seed"] == 1234
        and ruler["settings"]["version"] == dict.fromkeys(TASKS[1].split(","), 1)
        and ruler["settings"]["model"]["model"]
    )
    assert set(ruler["metrics"]["tasks"]) == set(TASKS[1].split(","))
    assert all(of["2200"]["samples"] == of["3072"]["samples"] == 2 for of in ruler["metrics"]["tasks"].values())
    assert set(ruler["metrics"]["groups"]) == {"NIAH", "VT", "QA"}
    for name in ("ruler.png", "needle.png", "report.md"):
        assert (undisturbed / name).stat().st_size > 500, name


def test_ruler_fills_its_lengths(undisturbed: Path) -> None:
    samples = rows(undisturbed / "ruler" / "samples.jsonl")
    assert len(samples) == 24
    for row in samples:
        limit = {"vt": 30, "qa_1": 32, "qa_2": 32}.get(row["task"], 128)
        assert 0.95 * row["length"] <= row["prompt_tokens"] + limit <= row["length"]
        assert row["new_tokens"] <= limit


def test_needles_are_at_every_depth(undisturbed: Path) -> None:
    needles = rows(undisturbed / "needle" / "samples.jsonl")
    assert len(needles) == 2 * 2 * 4 and {r["depth"] for r in needles} == {0, 33.3, 66.7, 100}


def test_books_are_cut_and_bad_lines_reported(undisturbed: Path) -> None:
    books = rows(undisturbed / "infinitebench" / "samples.jsonl")
    assert len(books) == 6 and all(r["cut"] and r["prompt_tokens"] + 40 <= 3072 for r in books)
    bad = rows(undisturbed / "infinitebench.rejected.jsonl")
    assert [(b["task"], b["line"]) for b in bad] == [
        (t, 2) for t in ("longbook_sum_eng", "longbook_qa_eng", "longbook_choice_eng")
    ]


def test_keeping_prefixes_changes_no_answer(made: Path, undisturbed: Path) -> None:
    """Read from what was kept and decoded together: the same words as each alone."""
    from megatron_longpo.engines.base import Prompt, Sampling
    from megatron_longpo.engines.transformers_engine import TransformersEngine
    from megatron_longpo.evaluation.materials import read_materials
    from megatron_longpo.evaluation.suites.ruler.samples import Ruler

    materials = read_materials([str(made / "texts")], None)
    engine = TransformersEngine(made / "model", dtype="float32", batch_size=1)
    ruler = Ruler(materials, prompt_counter(engine.tokenizer), 1234)
    found = answers(undisturbed / "ruler")
    for task in ("niah_single_2", "niah_multivalue"):
        for index in range(2):
            sample = ruler.sample(task, 2200, index)
            ((reply,),) = engine.answer(
                [[Prompt(({"role": "user", "content": sample.message},), prefix=sample.prefix)]], Sampling(128)
            )
            assert reply.text == found[sample.key][0]
            assert reply.text


def test_killed_and_split_anew_it_goes_on(made: Path, undisturbed: Path) -> None:
    output = made / "killed"
    process = Running([*TOOL, *arguments(made, output), *TASKS, "--tasks", "ruler,needle"], fresh=True)
    path = output / "ruler" / "parts" / "0-of-1" / "answers.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline, process.output()
        time.sleep(0.005)
    process.kill()
    kept = path.read_bytes().count(b"\n")
    assert 4 <= kept < 24
    # On two processes; what is there is not asked again. Preferences, which the two compute together, come after what
    # they answer apart.
    make_data(made / "pairs", 3, seed=3)
    more = ["--tasks", "ruler,needle,preference", "--pairs", str(made / "pairs"), "--context-parallel-size", "2"]
    done = run(torchrun(2, *TOOL[1:], *arguments(made, output), *TASKS, *more), fresh=True)
    assert "samples" in done.stdout
    assert path.read_bytes().count(b"\n") == kept
    for suite in ("ruler", "needle"):
        found, expected = answers(output / suite), answers(undisturbed / suite)
        assert found.keys() == expected.keys()
        # The tiny model's likeliest tokens are far ahead of the next: other batches change no answer.
        assert found == expected
    results = json.loads((output / "results.json").read_text())["suites"]
    assert set(results) == {"ruler", "needle", "preference"}
    of_pairs = [r["score"] for r in rows(output / "preference" / "samples.jsonl") if r["task"] == "nll"]
    assert results["preference"]["metrics"]["nll"] == pytest.approx(sum(of_pairs) / 3) and len(of_pairs) == 3


def test_comparison(made: Path, undisturbed: Path) -> None:
    other = made / "after"
    run([*TOOL, *arguments(made, other, "other"), *TASKS, "--tasks", "ruler,infinitebench", "--lengths", "2200"])
    done = run([*TOOL, "--compare", str(undisturbed), str(other), "--output", str(made / "comparison")])
    assert "95 % interval" in done.stdout
    content = json.loads((made / "comparison" / "comparison.json").read_text())
    lines = {(d["suite"], d["name"], d["length"]): d for d in content["differences"]}
    assert ("ruler", "average", "2200") in lines and ("ruler", "NIAH (mean)", "2200") in lines
    assert not any(suite == "needle" or length == "3072" for suite, _, length in lines)
    first = answers(undisturbed / "ruler")
    of_task = [s for k, (_, s) in first.items() if k.startswith("ruler/vt/2200/")]
    assert lines["ruler", "vt", "2200"]["first_mean"] == pytest.approx(sum(of_task) / 2)
    assert all(d["low"] <= d["other_mean"] - d["first_mean"] <= d["high"] and d["paired"] for d in lines.values())
    assert (made / "comparison" / "comparison.png").stat().st_size > 5000
    assert "| ruler average | 2200 | after |" in (made / "comparison" / "comparison.md").read_text()
    with pytest.raises(ConfigError, match="at least two folders"):
        write_comparison([undisturbed], made / "comparison")
    with pytest.raises(ConfigError, match=r"results\.json: there is no such file"):
        write_comparison([undisturbed, made], made / "comparison")


def test_a_bad_command_is_refused_before_any_work(made: Path) -> None:
    base = [*TOOL, "--model", str(made / "model"), "--output", str(made / "refused")]
    for more, message in (
        (["--tasks", "ruler", "--ruler-tasks", "vt", "--lengths", "200"], "vt at 200 tokens"),
        # Of suites that come last, as early.
        (
            [
                *("--tasks", "infinitebench,ruler", "--infinitebench", str(made / "infinitebench"), "--samples", "500"),
                *("--ruler-tasks", "qa_1", "--squad", str(made / "squad.jsonl"), "--lengths", "2200"),
            ],
            "samples=500 is more than the 40 questions of qa_1",
        ),
        (["--tasks", "ruler,preference", "--ruler-tasks", "vt", "--pairs", str(made / "no")], "no.json"),
    ):
        refused = run([*base, *more], expect=2)
        assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not list((made / "refused").rglob("answers.jsonl"))


# --------------------------------------------------------------------------------------------------
# Short context, by the harness on local data
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_data(made: Path) -> Path:
    """Data sets with the hub's columns: rows as JSONL, and a folder as ``save_to_disk`` leaves it."""
    import datasets

    folder, rng = made / "short", random.Random(4)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    def arc(n: int) -> list[dict[str, Any]]:
        choices = {"text": [words(2) for _ in range(4)], "label": list("ABCD")}
        return [
            {"id": str(i), "question": words(6) + "?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(n)
        ]

    def save(name: str, split: str, found: list[dict[str, Any]]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))

    save("arc_challenge", "train", arc(30))
    save("arc_challenge", "test", arc(6))
    for split, count in (("dev", 5), ("test", 4)):
        found = [
            {"question": words(5), "subject": "anatomy", "choices": [words(1) for _ in range(4)], "answer": i % 4}
            for i in range(count)
        ]
        save("mmlu/anatomy", split, found)
    found = [
        {"sentence": f"{words(3)} because _ {words(2)}.", "option1": "Ann", "option2": "Bob", "answer": str(1 + i % 2)}
        for i in range(12)
    ]
    datasets.Dataset.from_list(found).save_to_disk(folder / "winogrande" / "validation")
    found = [
        {
            "ind": i,
            "activity_label": words(1),
            "ctx_a": words(5) + ".",
            "ctx_b": words(2),
            "endings": [words(4) for _ in range(4)],
            "label": str(i % 4),
        }
        for i in range(14)
    ]
    save("hellaswag", "validation", found)
    return folder


def test_short_context_on_local_data(made: Path, short_data: Path) -> None:
    output = made / "short-results"
    command = [*TOOL, "--model", str(made / "model"), "--dtype", "float32", "--output", str(output), "--tasks", "short"]
    run([*command, "--short-data", str(short_data)], env=environment(HF_HUB_OFFLINE="1"))
    found = json.loads((output / "results.json").read_text())["suites"]["short"]
    assert {t: of["samples"] for t, of in found["metrics"]["tasks"].items()} == {
        "mmlu": 4,
        "arc_challenge": 6,
        "hellaswag": 14,
        "winogrande": 12,
    }
    assert found["settings"]["shots"] == {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
    assert found["settings"]["local"]["hellaswag"] == {"questions": "validation", "examples": "validation"}
    # Right is what has the largest log-prob, where length does not count (Winogrande's target is a text).
    questions = [r for r in rows(output / "short" / "samples.jsonl") if r["task"] != "winogrande"]
    assert 0 < sum(r["acc"] for r in questions) < len(questions)
    for row in questions:
        best = max(range(len(row["log_probs"])), key=row["log_probs"].__getitem__)
        assert row["acc"] == float(best == int(row["target"])), row
    # Without some data the rest is not begun.
    with pytest.raises(DataError, match="has no data for mmlu"):
        load_tasks(["mmlu"], made / "texts", None, 1)


# --------------------------------------------------------------------------------------------------
# Held-out preferences
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preferences(made: Path) -> Path:
    """A policy and a reference, data and held-out data; what the tool finds of the held-out data is in ``results``."""
    folder = made / "preference"
    for seed, name in ((0, "policy"), (1, "reference")):
        make_model("llama", folder / name, seed=seed)
        import_hf(folder / name, folder / f"{name}.ckpt")
    make_data(folder / "held_out", 5, seed=3)
    make_data(folder / "data", 4, seed=4)
    run(evaluate_preferences(folder, output=folder / "results"))
    return folder


def evaluate_preferences(folder: Path, **flags: Any) -> list[str]:
    """Evaluation of the held-out data."""
    models = {"model": folder / "policy", "reference_model": folder / "reference", "dtype": "float32"}
    return command("evaluate", tasks="preference", pairs=folder / "held_out", **models, **flags)


def train_preferences(folder: Path, **flags: Any) -> list[str]:
    """Training of the same two models, evaluated on the same held-out data."""
    checkpoints = {"load": folder / "policy.ckpt", "reference_load": folder / "reference.ckpt"}
    return command("train", valid_data_path=folder / "held_out", global_batch_size=2, **checkpoints, **flags)


def preference_metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())["suites"]["preference"]["metrics"]


def test_preferences_count_every_pair(preferences: Path) -> None:
    found = preference_metrics(preferences / "results")
    assert found["samples"] == 5 and sum(of["samples"] for of in found["by_length"].values()) == 5
    kept = rows(preferences / "results" / "preference" / "parts" / "0-of-1" / "answers.jsonl")
    assert [r["index"] for r in kept] == [0, 1, 2, 3, 4]


def test_interrupted_preferences_resume_on_two_processes(preferences: Path) -> None:
    """Interrupted in the third line; the rest by context parallelism: the same figures."""
    before, output = preferences / "results", preferences / "two"
    kept = (before / "preference" / "parts" / "0-of-1" / "answers.jsonl").read_text().splitlines(keepends=True)
    interrupted = output / "preference" / "parts" / "0-of-1" / "answers.jsonl"
    interrupted.parent.mkdir(parents=True)
    interrupted.write_text("".join(kept[:2]) + kept[2][:40])
    shutil.copy(before / "preference" / "settings.json", output / "preference")
    done = run(evaluate_preferences(preferences, output=output, processes=2, context_parallel_size=2))
    assert "preference: 2 samples of an earlier run are kept" in done.stdout
    fresh = rows(output / "preference" / "parts" / "0-of-2" / "answers.jsonl")
    assert [r["index"] for r in fresh] == [2, 3, 4]
    found, expected = preference_metrics(output), preference_metrics(before)
    for name in ("loss", "nll", "logps/chosen", "kl/rejected", "rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_training_reports_before_its_first_step_what_the_tool_finds(preferences: Path) -> None:
    output = preferences / "run"
    schedule = {"train_iters": 3, "eval_interval": 2, "lr": 1e-3}
    done = run(train_preferences(preferences, data_path=preferences / "data", save=output, **schedule))
    assert "after step 0: held-out loss" in done.stdout
    reported = rows(output / "validation.jsonl")
    assert [r["step"] for r in reported] == [0, 2, 3]
    expected = preference_metrics(preferences / "results")
    for name in ("loss", "nll", "rewards/margins", "kl/chosen", "kl/rejected"):
        assert reported[0][name] == pytest.approx(expected[name], rel=1e-5), name
    assert reported[2]["loss"] != reported[0]["loss"]


def test_held_out_data_are_evaluated_without_training(preferences: Path) -> None:
    """Without training data or optimizer."""
    done = run(train_preferences(preferences, skip_train=True))
    expected = preference_metrics(preferences / "results")["loss"]
    assert f"held-out loss {expected:.4f}" in done.stdout


def test_a_server_answers_as_the_model_in_this_process(
    made: Path, chat_model: Path, server: str, undisturbed: Path
) -> None:
    """Also through a proxy that drops, refuses, cuts and stalls; and that the beginning of an answer is asked for."""
    output = made / "served"
    proxy = FlakyProxy(server, seed=2, stall_seconds=60)
    try:
        more = ["--engine", "openai", "--base-url", f"{proxy.url}/v1", "--model", str(chat_model)]
        more += ["--tokenizer", str(made / "model"), "--timeout-seconds", "5", "--retries", "40"]
        tasks = ["--tasks", "infinitebench,ruler", "--infinitebench-tasks", "longbook_qa_eng", "--ruler-tasks", "vt"]
        run([*TOOL, *arguments(made, output), *more, *tasks])
    finally:
        proxy.close()
    found, expected = answers(output / "infinitebench"), answers(undisturbed / "infinitebench")
    assert len(found) == 2 and all(expected[key] == value for key, value in found.items())
    assert len(answers(output / "ruler")) == 4
    settings = json.loads((output / "results.json").read_text())["suites"]["ruler"]["settings"]
    assert settings["model"]["engine"] == "openai"
