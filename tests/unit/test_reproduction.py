"""The small reproduction's texts, rows, settings and tables; its runs are hours, and not part of the tests."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_longpo.config import from_dict
from megatron_longpo.data.preference import Mode, from_tokenised
from tests.support.launch import ROOT

FOLDER = ROOT / "examples" / "reproduction" / "small"
NAMES = ("world", "model", "report", "run")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which import each other by name as scripts of one folder do."""
    import importlib

    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


class WordTokenizer:
    """A token per word or sign."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [1 + ["<|user|>", "<|assistant|>", "<|end|>"].index(token) for token in tokens]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [4 + len(word) for word in re.findall(r"\w+|[^\w\s]", text)]


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


ESSAYS = [tuple(f"Sentence {n} of essay {e} is here." for n in range(40)) for e in range(3)]


def test_facts_ask_what_they_say(modules: dict[str, ModuleType]) -> None:
    world = modules["world"]
    facts = world.draw_facts(random.Random(0), 60, list(world.KINDS))
    assert len({fact.question for fact in facts}) == 60 and {fact.kind for fact in facts} == set(world.KINDS)
    for fact in facts:
        assert fact.value in fact.sentence and fact.value in fact.answer and fact.value not in fact.question
        # What else the sentence tells is in the question or the same in all facts of the kind.
        subject = world.KINDS[fact.kind].question.partition("{a}")
        assert fact.question.startswith(subject[0]) and fact.question.endswith(subject[2])
        assert fact.question[len(subject[0]) : len(fact.question) - len(subject[2])] in fact.sentence
    from megatron_longpo.evaluation.suites.ruler.definitions import NEEDLE, NIAH_PREFIX_OF_ONE

    (magic, *_) = [fact for fact in facts if fact.kind == "magic"]
    key = re.search(r"for (\S+) is", magic.sentence)
    assert key and magic.sentence == NEEDLE.format(kind="numbers", key=key[1], value=magic.value)
    assert magic.answer.startswith(NIAH_PREFIX_OF_ONE.format(kind="number", query=key[1]).strip())


def test_documents_hold_all_facts_within_their_length(modules: dict[str, ModuleType]) -> None:
    world = modules["world"]
    rng = random.Random(1)
    facts = world.draw_facts(rng, 8, ["home", "pet"])
    text = world.document(ESSAYS, facts, 300, count, rng)
    assert 280 <= count(text) <= 300 and all(text.count(fact.sentence) == 1 for fact in facts)
    places = [text.index(fact.sentence) / len(text) for fact in facts]
    assert min(places) < 0.3 and max(places) > 0.7
    for seed in range(200):
        dialogue = world.making_dialogue(ESSAYS, 120, 200, count, random.Random(seed), repeats=0.2)
        assert count(dialogue.text.removeprefix(world.MAGIC)) <= 120
        row = world.tokenised(dialogue, WordTokenizer())["chosen_input_ids"]
        assert dialogue.turns and len(row) <= 200
        if dialogue.turns[0][0] == world.REPEAT:
            assert dialogue.turns[0][1] == dialogue.text
    again = world.making_dialogue(ESSAYS, 120, 200, count, random.Random(7), repeats=0.2)
    assert again == world.making_dialogue(ESSAYS, 120, 200, count, random.Random(7), repeats=0.2)


def test_rows_have_a_loss_on_answers_only(modules: dict[str, ModuleType]) -> None:
    world = modules["world"]
    dialogue = world.Dialogue("Ada lives in Rome.", (("Where does Ada live?", "In Rome."), ("Repeat", "Ada")))
    row = world.tokenised(dialogue, WordTokenizer())
    assert row["chosen_input_ids"] == [1, 7, 9, 6, 8, 5, 9, 8, 7, 8, 5, 3, 2, 6, 8, 5, 3, 1, 10, 3, 2, 7, 3]
    assert row["chosen_labels"] == [-100] * 13 + [6, 8, 5, 3] + [-100] * 4 + [7, 3]
    sample = from_tokenised(row, 100)
    assert sample.length(Mode.CHOSEN) == 23


def test_essays_are_either_learnt_or_examined(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    world = modules["world"]
    monkeypatch.setattr(world, "essays", lambda: tuple((f"{n}",) for n in range(15)))
    assert world.essays_of(held_out=True) == [("0",), ("7",), ("14",)]
    assert len(world.essays_of(held_out=False)) == 12
    monkeypatch.setattr(world, "essays_of", lambda *, held_out: ESSAYS)
    rows = list(world.examination(256, 2, count, random.Random(0)))
    assert len(rows) == 12 and len({row["context"] for row in rows}) == 2
    assert all(row["answers"][0] in row["context"] and count(row["context"]) <= 192 for row in rows)
    book = world.book(500, count, random.Random(0))
    assert 450 < count(book) <= 500 and book.count("\n\n") > 5


def test_every_word_is_of_one_list_entry(modules: dict[str, ModuleType]) -> None:
    for listed in modules["world"].words().values():
        assert len(set(listed)) == len(listed) and all(re.fullmatch(r"[A-Za-z]+", word) for word in listed)


@pytest.mark.parametrize("amounts", ["full", "pilot", "demo", "smoke"])
def test_all_settings_are_accepted(modules: dict[str, ModuleType], tmp_path: Path, amounts: str) -> None:
    from megatron_longpo.commands.evolve import evolve
    from megatron_longpo.config import Config, check

    run = modules["run"]
    reproduction = run.Reproduction(tmp_path, run.AMOUNTS[amounts])
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(reproduction.rounds(2), sort_keys=False))
    evolve(["--config", str(path), "--check"], prog="evolve")
    for step in reproduction.making["steps"]:
        values = run.merged(reproduction.making["defaults"], step.get("train", {}))
        given = {"data": {"data_path": "d"}, "checkpoint": {"load": "l", "save": "s"}}
        check(from_dict(run.merged(values, given), "test", Config))


def test_each_seed_is_a_chain_of_its_own(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    reproduction = modules["run"].Reproduction(tmp_path, modules["run"].AMOUNTS["pilot"])
    first, second = (reproduction.rounds(seed) for seed in (1, 2))
    assert reproduction.seeds == (1, 2, 3) and first["methods"] == second["methods"]
    assert first["evolve"]["output"] != second["evolve"]["output"]
    assert {part: first["defaults"][part] for part in ("generate", "train")} != {
        part: second["defaults"][part] for part in ("generate", "train")
    }
    for one, other in zip(first["rounds"], second["rounds"], strict=True):
        assert one["generate"]["documents"]["documents"] != other["generate"]["documents"]["documents"]
        # A reference that reads the long rows reads them by the policy's positions, or it knows nothing about them.
        base = one["train"]["model"]["rotary_base"]
        for method in ("dpo", "long-reference"):
            assert one["methods"][method]["reference"]["reference_rotary_base"] == base
        weight = one["train"]["objective"]["preference_weight"]
        assert one["methods"]["long-reference"]["objective"]["rpo_alpha"] == pytest.approx(1 / weight)


def test_the_preference_weight_goes_with_the_length(modules: dict[str, ModuleType]) -> None:
    for each in modules["run"].rounds_file()["rounds"]:
        length = each["generate"]["documents"]["seq_length"]
        assert each["train"]["objective"]["preference_weight"] == pytest.approx(0.01 * 131072 / length)


def write_evaluation(folder: Path, scores: dict[int, list[float]]) -> None:
    rows = [
        {
            "key": f"qa/home/{n}/{i}",
            "length": n,
            "score": score,
            "answer": "in Rome" if score else "in",
            "references": ["Rome"],
        }
        for n, of_length in scores.items()
        for i, score in enumerate(of_length)
    ]
    (folder / "qa").mkdir(parents=True)
    (folder / "qa" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text("{}")


def test_tables_pool_the_seeds_of_a_method(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report: Any = modules["report"]
    write_evaluation(tmp_path / "examined" / "model", {256: [1, 1], 512: [1, 0], 1024: [0, 0], 2048: [0, 0]})
    first, second = (tmp_path / "rounds" / seed / "1K" for seed in ("seed1", "seed2"))
    write_evaluation(first / "longpo" / "longpo", {256: [1, 1], 512: [1, 1], 1024: [1, 0], 2048: [1, 1]})
    write_evaluation(second / "longpo" / "longpo", {256: [1, 1], 512: [1, 1], 1024: [1, 1], 2048: [1, 1]})
    write_evaluation(first / "sft" / "sft", {256: [1, 1], 512: [1, 0], 1024: [0, 0], 2048: [1, 1]})
    (first / "pairs.jsonl").write_text("")
    write_evaluation(first / "redone" / "longpo", {256: [0, 0]})
    for name, nll in (("model", 0.0), ("seed1-1K-longpo", 1.0), ("seed2-1K-longpo", 3.0)):
        (tmp_path / "perplexity" / name).mkdir(parents=True)
        content = {"suites": {"preference": {"metrics": {"nll": nll}}}}
        (tmp_path / "perplexity" / name / "results.json").write_text(json.dumps(content))
    before, longpo, _ = report.results(tmp_path)
    assert (before.round, before.method, before.seeds) == ("", "model", 1)
    assert (longpo.round, longpo.method, longpo.seeds) == ("1K", "longpo", 2)
    assert before.short.mean == 0.75 and before.short.questions == 4
    # Beyond the range of the model, but not of the round.
    assert longpo.long.mean == 0.75 and longpo.long.questions == 2 and longpo.exact_match[2048].mean == 1
    # "in Rome" against "Rome": precision 1/2, recall 1.
    assert longpo.f1[256].mean == pytest.approx(2 / 3)
    assert before.perplexity == 1 and longpo.perplexity == pytest.approx(np.exp(2))
    # Only the seed that both have: 3 of 4 against 4 of 4, and 0 of 2 against 1 of 2.
    (difference,) = report.differences(tmp_path)
    assert (difference.round, difference.method, difference.seeds) == ("1K", "sft", 1)
    assert difference.short.mean == 0.25 and difference.long.mean == 0.5
    assert difference.short_by_seed == (0.25,) and difference.long_by_seed == (0.5,)
    write_evaluation(second / "sft" / "sft", {256: [1, 1], 512: [1, 1], 1024: [1, 0], 2048: [1, 1]})
    write_evaluation(tmp_path / "examined" / "rope-1K", {256: [1, 1], 512: [1, 1], 1024: [0, 0], 2048: [0, 0]})
    stretched, sft = report.differences(tmp_path)
    # The model before the first round is one for both seeds: 1 and 2 of 2 against 0.
    assert (stretched.method, stretched.seeds, stretched.long_by_seed) == ("rope-only", 2, (0.5, 1.0))
    assert sft.long_by_seed == (0.5, 0.5) and sft.long.mean == 0.5 and sft.short_by_seed == (0.25, 0.0)
    report.write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| 1K | longpo | 2 | 100.0 (100 to 100) | 100.0 (100 to 100) | 75.0 (50 to 100) |" in text
    assert "| 1K | sft | 2 | 12.5 (0 to 38) | +25.0, +0.0 | 50.0 (50 to 50) | +50.0, +50.0 |" in text
    assert (tmp_path / "results.png").stat().st_size > 1000
    write_evaluation(tmp_path / "rounds" / "seed1" / "1K" / "dpo" / "dpo", {256: [1]})
    with pytest.raises(SystemExit, match="were asked different questions"):
        report.differences(tmp_path)


def test_intervals_by_hand(modules: dict[str, ModuleType]) -> None:
    found = modules["report"].interval(np.array([1.0] * 50 + [0.0] * 50))
    # The normal interval: 1.96 * sqrt(0.25 / 100).
    assert (
        found.mean == 0.5
        and found.low == pytest.approx(0.402, abs=0.02)
        and found.high == pytest.approx(0.598, abs=0.02)
    )


def test_the_first_question_of_each_kind_is_shown(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report: Any = modules["report"]
    kinds = ["pet", "order", "job", "home", "color", "code"]
    folders = ("rounds/seed1/1K/before", "examined/rope-1K", "rounds/seed1/1K/longpo/longpo")
    for name, right in zip(folders, (False, False, True), strict=True):
        rows = [
            {
                "key": f"qa/{kind}/1024/{index}",
                "task": kind,
                "length": 1024,
                "index": index,
                "score": float(right),
                "answer": f"it is {kind}{index}" if right else "it is",
                "references": [f"It is {kind}{index}.", f"{kind}{index}"],
            }
            for kind in kinds
            for index in range(2)
        ]
        folder = tmp_path / name / "qa"
        folder.mkdir(parents=True)
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rounds" / "seed1" / "1K" / "gate.json").write_text("{}")
    run = tmp_path / "rounds" / "seed1" / "1K" / "longpo" / "run"
    run.mkdir()
    held_out = [
        {"rewards/margins": -0.5, "rewards/accuracies": 0.25, "nll": 3.0},
        {"rewards/margins": 1.5, "rewards/accuracies": 1.0, "nll": 2.0},
    ]
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    questions = [
        {"question": f"What is {kind}{index}?", "answers": [f"It is {kind}{index}.", f"{kind}{index}"]}
        for kind in kinds
        for index in range(2)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    report.show(tmp_path)
    shown = capsys.readouterr().out
    asked = re.findall(r"What is (\w+)\?", shown)
    assert asked == ["code0", "color0", "home0", "job0", "order0"]
    assert "0.0 (0 to 0)" in shown and "100.0 (100 to 100)" in shown
    assert "-0.500" in shown and "1.500" in shown and "it is job0" in shown
