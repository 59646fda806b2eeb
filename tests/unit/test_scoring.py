"""Scores against the definitions of the benchmarks, written out anew."""

from __future__ import annotations

import random
import re
import string

import numpy as np
import pytest

from megatron_longpo.evaluation import scoring

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
    """En.MC step by step as arXiv 2402.13718's present code says it."""
    pred = pred.strip()

    def stands_alone(line: str, i: int) -> bool:
        def is_word(c: str) -> bool:
            return c.isalnum() or c == "_"

        before, after = line[i - 1 : i] if i else "", line[i + 1 : i + 2]
        return line[i] in "ABCD" and not (before and is_word(before)) and not (after and is_word(after))

    for line in pred.split("\n"):
        letters = [line[i] for i in range(len(line)) if stands_alone(line, i)]
        if letters:
            if letters[-1] in label:
                return True
            break
    if pred == "":
        return False
    if pred[0] in ("A", "B", "C", "D"):
        return pred[0] in label
    if any(pred == s for s in label):
        return True
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


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("B", ["the river", "B"], 1.0),
        ("B. the river", ["the river", "B"], 1.0),
        ("A or B? I think it is B", ["the river", "B"], 1.0),
        ("A or B? I think it is C", ["the river", "B"], 0.0),
        # The last letter of the first line that has one, then the first character.
        ("A\nB", ["the river", "B"], 0.0),
        ("the river", ["the river", "B"], 1.0),
        ("The answer is: the river", ["the river", "B"], 1.0),
        ("The answer is: the tower", ["the river", "B"], 0.0),
        (" \n", ["the river", "B"], 0.0),
    ],
)
def test_option_accuracy_by_hand(answer: str, label: list[str], expected: float) -> None:
    assert scoring.option_accuracy(answer, label) == expected


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
