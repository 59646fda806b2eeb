"""Numbers of a suite from its rows: cells of task and length, and means over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict, TypeVar

import numpy as np

from megatron_longpo.evaluation.samples import AnswerRow, cell_name, why_no_answer

Group = TypeVar("Group")
# Task -> length in tokens, as text -> score.
ScoresByCell = dict[str, dict[str, "CellScore"]]


class _CellScore(TypedDict):
    score: float
    stderr: float | None
    samples: int


class CellScore(_CellScore, total=False):
    """Mean score of some rows.

    ``stderr`` is the standard error of the mean, None for a single row. ``unfinished`` counts the answers that were cut at their
    limit of tokens and scored as far as they went. Where some rows are no answers, and count as wrong, ``no_answer`` has their
    number by reason, ``refused`` that of this reason, and ``score_of_answers`` the mean over the other rows.
    """

    unfinished: int
    no_answer: dict[str, int]
    refused: int
    score_of_answers: float | None


def score_of(rows: Sequence[AnswerRow]) -> CellScore:
    """Mean score of rows, with its standard error and counts."""
    scores = np.array([row["score"] for row in rows], dtype=float)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    result: CellScore = {"score": float(scores.mean()), "stderr": error, "samples": len(rows)}
    reasons = [why_no_answer(row) for row in rows]
    if unfinished := sum(not row.get("finished", True) and not why for row, why in zip(rows, reasons, strict=True)):
        result["unfinished"] = unfinished
    if missing := Counter(why for why in reasons if why):
        result["no_answer"] = dict(missing)
        answers = [row["score"] for row, why in zip(rows, reasons, strict=True) if not why]
        result["score_of_answers"] = float(np.mean(answers)) if answers else None
        if refused := missing["refused"]:
            result["refused"] = refused
    return result


def missing_answers(cells: Iterable[CellScore]) -> Counter[str]:
    """Number of samples without an answer, by reason."""
    counts: Counter[str] = Counter()
    for cell in cells:
        # Version 0.1 counted only what was refused.
        counts.update(cell.get("no_answer", {"refused": cell.get("refused", 0)}))
    return +counts


_REASONS = {
    "refused": "refused by the engine",
    "declined": "declined by the server or the model",
    "empty": "empty",
    "only_thinking": "only thinking",
    "not_finite": "without finite log-probs",
}


def in_words(missing: Mapping[str, int]) -> str:
    """Counts of samples without an answer, such as "2 empty, 1 only thinking"."""
    return ", ".join(f"{count} {_REASONS.get(reason, reason)}" for reason, count in missing.items())


def group_by(rows: Iterable[AnswerRow], key: Callable[[AnswerRow], Group]) -> dict[Group, list[AnswerRow]]:
    """Rows by key, in the order in which the keys first appear."""
    groups: dict[Group, list[AnswerRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def count_cells(rows: Sequence[AnswerRow]) -> dict[str, int]:
    """Number of samples per cell."""
    return {name: len(group) for name, group in group_by(rows, lambda row: cell_name(row["key"])).items()}


def scores_by_cell(rows: Sequence[AnswerRow], tasks: Sequence[str] = ()) -> ScoresByCell:
    """Score per task and length.

    Args:
        rows: all rows of a suite.
        tasks: order of the tasks in the result; others come after them, in order of appearance.
    """
    by_task = group_by(rows, lambda row: row["task"])
    ordered = [task for task in tasks if task in by_task] + [task for task in by_task if task not in tasks]
    return {
        task: {
            str(length): score_of(cell)
            for length, cell in sorted(group_by(by_task[task], lambda row: row["length"]).items())
        }
        for task in ordered
    }


def lengths_of(cells: Mapping[str, Mapping[str, object]]) -> list[str]:
    """All lengths that occur, ascending."""
    return sorted({length for by_length in cells.values() for length in by_length}, key=int)


def mean_over_tasks(cells: ScoresByCell, tasks: Sequence[str], length: str) -> float | None:
    """Mean score of tasks at a length; None if a task lacks it, since a mean over other tasks would not be comparable."""
    if not all(length in cells[task] for task in tasks):
        return None
    return float(np.mean([cells[task][length]["score"] for task in tasks]))
