"""InfiniteBench (arXiv 2402.13718): En.Sum, En.QA and En.MC, from the published files.

Prompts, truncation in the middle, answer lengths and scores are the benchmark's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.errors import DataError
from megatron_longpo.evaluation.samples import CountPrompt, EvalSample, middle_cut
from megatron_longpo.text.chat import ChatTokenizer

# 2: En.MC by the steps of the benchmark's present code.
VERSION = 2

_OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
PROMPTS = {
    # The benchmark's for GPT-4.
    "chat": {
        "longbook_sum_eng": "Summarize the following book.\n\n{context}",
        "longbook_qa_eng": "Read the book below and answer a question.\n\n{context}\n\nQuestion: {question}\n\nBe very concise.",
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n\nOnly one of the following "
            "options is correct, tell me the answer using one single letter (A, B, C, or D). Don't say anything else."
            + _OPTIONS
        ),
    },
    # The benchmark's for YaRN-Mistral.
    "base": {
        "longbook_sum_eng": "Summarize the book below.\n\n{context}\n\nSummary:",
        "longbook_qa_eng": (
            "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: "
            "{question}\nAnswer:"
        ),
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}"
            + _OPTIONS
            + "\n\nThe letter of the correct answer is"
        ),
    },
}
SCORERS = {
    "longbook_sum_eng": "rouge_lsum",
    "longbook_qa_eng": "token_f1",
    "longbook_choice_eng": "option_accuracy",
}
MAX_TOKENS = {"longbook_sum_eng": 1200, "longbook_qa_eng": 40, "longbook_choice_eng": 40}
TASKS = tuple(SCORERS)
TITLES = {"longbook_sum_eng": "En.Sum", "longbook_qa_eng": "En.QA", "longbook_choice_eng": "En.MC"}


@dataclass(frozen=True)
class BadLine:
    """A line that is none of the benchmark's."""

    task: str
    line: int
    reason: str
    text: str


def read_task(folder: Path, task: str) -> tuple[list[dict[str, Any]], list[BadLine]]:
    """Rows of a task's file, and the lines that are kept aside.

    Raises:
        DataError: no such file, or no good row.
    """
    path = folder / f"{task}.jsonl"
    rows, bad = [], []
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(_checked(json.loads(line), task))
                except (ValueError, RecursionError) as error:
                    bad.append(BadLine(task, number, " ".join(str(error).split())[:200], line[:500].rstrip("\n")))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name the folder of InfiniteBench's JSONL files"
        ) from None
    if not rows:
        raise DataError(
            f"{path}: none of its {len(bad)} lines is a row of {task} ({bad[0].reason if bad else 'empty'})"
        )
    return rows, bad


def _checked(row: Any, task: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    # Rows of the first release say content and question.
    context, question = row.get("context", row.get("content")), row.get("input", row.get("question", ""))
    answer = row.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(context, str) or not context.strip():
        raise ValueError("has no context")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError("has no answer")
    if task != "longbook_sum_eng" and not (isinstance(question, str) and question.strip()):
        raise ValueError("has no input (the question)")
    options = row.get("options")
    if task == "longbook_choice_eng":
        if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) for o in options):
            raise ValueError("has no four options")
        if len(answers) == 1:
            # The option's text; its letter counts too.
            if answers[0] not in options:
                raise ValueError("its answer is none of its options")
            answers = [answers[0], "ABCD"[options.index(answers[0])]]
    return {"context": context, "question": question, "answers": answers, "options": options}


def prompt_of(row: dict[str, Any], task: str, kind: str) -> str:
    """The benchmark's prompt, whole."""
    values = {"context": row["context"], "question": row["question"]}
    values |= dict(zip("ABCD", row["options"] or ("",) * 4, strict=True))
    return PROMPTS[kind][task].format(**values)


def cut_to(message: str, budget: int, tokenizer: ChatTokenizer, count: CountPrompt) -> str:
    """A message with its middle taken out, so that its prompt has at most ``budget`` tokens.

    Raises:
        DataError: the template alone has more.
    """
    tokens = count(message, "")
    if tokens <= budget:
        return message
    ids = tokenizer.encode(message, continues=False)
    keep = len(ids) - (tokens - budget)
    while keep > 0:
        front, back = middle_cut(ids, keep)
        cut = tokenizer.decode(front) + tokenizer.decode(back)
        over = count(cut, "") - budget
        if over <= 0:
            return cut
        # Text put together anew may fall into other tokens.
        keep -= over
    raise DataError(f"a length of {budget} tokens has no room for any text; raise lengths")


def sample_of(
    row: dict[str, Any], task: str, index: int, length: int, kind: str, tokenizer: ChatTokenizer, count: CountPrompt
) -> EvalSample:
    """A row as a sample of at most ``length`` tokens."""
    whole = prompt_of(row, task, kind)
    message = cut_to(whole, length - MAX_TOKENS[task], tokenizer, count)
    return EvalSample(
        *("infinitebench", task, length, index, message, "", tuple(row["answers"]), SCORERS[task], MAX_TOKENS[task]),
        count(message, ""),
        {"cut": message != whole},
    )
