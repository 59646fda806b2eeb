"""The report of an evaluation: results.json for programs; report.md and pictures for people."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.evaluation.metrics import CellScore, in_words, missing_answers
from megatron_longpo.evaluation.registry import SUITES, suite_of
from megatron_longpo.evaluation.results import read_or_begin, with_result, without_suites, write_results
from megatron_longpo.evaluation.suites.base import Cell, HeatMap, SuiteResult, percent
from megatron_longpo.runtime.files import FolderLock, sha256_of, write_atomically
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.tables import Table

# Files beside the suites' folders.
REPORT_FILES = ("results.json", "report.md", *(f"{suite}.png" for suite in SUITES))


def write_report(output: Path, suite: str, result: SuiteResult) -> None:
    """Add a suite to the report, beside those of earlier runs.

    Args:
        output: folder of the evaluation.
        suite: name of the suite.
        result: its result.
    """
    # Another suite may be reported at the same time, by a command of its own.
    with FolderLock(output, wait=True):
        samples = output / suite / "samples.jsonl"
        content = with_result(
            read_or_begin(output),
            suite,
            settings=result.settings,
            asked=result.asked,
            metrics=result.metrics,
            samples_sha256=sha256_of(samples) if samples.exists() else None,
        )
        _write(output, content)


def remove_from_report(output: Path, suites: Collection[str]) -> None:
    """Take suites out of the report, because they are started over."""
    with FolderLock(output, wait=True):
        content = read_or_begin(output)
        kept = without_suites(content, suites)
        if kept != content:
            _write(output, kept)


def print_result(suite: str, result: SuiteResult) -> None:
    """Print the first table of a suite to the terminal, and what has no answer."""
    reported = suite_of(suite, "results")
    reported.tables(result.metrics)[0].print()
    if missing := missing_answers(reported.cells(result.metrics).values()):
        log(f"{suite}: {missing.total()} samples have no answer and count as wrong: {in_words(missing)}")


def _write(output: Path, content: dict[str, Any]) -> None:
    write_results(output, content)
    for name, result in content["suites"].items():
        heat_map = suite_of(name, f"{output}/results.json").heat_map(result["metrics"])
        if heat_map is not None:
            draw_heat_map(heat_map, output / f"{name}.png")
    write_atomically(output / "report.md", markdown(content).encode())


def markdown(content: dict[str, Any]) -> str:
    """The report as Markdown: every suite's tables, picture and settings.

    Args:
        content: content of results.json.
    """
    lines = ["# Evaluation", ""]
    for name, result in content["suites"].items():
        suite, metrics = suite_of(name, "results.json"), result["metrics"]
        for table in suite.tables(metrics):
            lines += [f"## {table.title}", "", *table.markdown(), ""]
        cells = suite.cells(metrics)
        if missing := missing_answers(cells.values()):
            lines += [f"{missing.total()} samples have no answer and count as wrong: {in_words(missing)}.", ""]
            lines += [*_without_answers(cells).markdown(), ""]
        if unfinished := sum(cell.get("unfinished", 0) for cell in cells.values()):
            lines += [f"{unfinished} answers were cut at their limit of tokens and scored as far as they went.", ""]
        if suite.heat_map(metrics) is not None:
            lines += [f"![{name}]({name}.png)", ""]
        if measured := suite.measured(result["settings"]):
            lines += [measured, ""]
        settings = json.dumps(result["settings"], ensure_ascii=False)
        lines += [f"Settings: `{settings}`", ""]
    return "\n".join(lines)


def _without_answers(cells: Mapping[Cell, CellScore]) -> Table:
    """Cells that have samples without an answer."""
    rows = [
        [cell.task, cell.length, str(score["samples"]), str(missing.total()), *map(percent, means)]
        for cell, score in cells.items()
        if (missing := missing_answers([score]))
        for means in [(score["score"], score.get("score_of_answers"))]
    ]
    return Table("Samples without an answer", ["task", "tokens", "samples", "no answer", "score", "of answers"], rows)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def draw_heat_map(heat_map: HeatMap, path: Path) -> None:
    """Draw scores as colours with their numbers in percent, a row per line and a column per length."""
    pyplot = load_pyplot()
    columns = heat_map.columns
    scores = [[by_length.get(column) for column in columns] for by_length in heat_map.rows.values()]
    # None becomes NaN.
    values = 100 * np.array(scores, dtype=float)
    size = (max(5.0, 2.4 + 0.9 * len(columns)), 1.6 + 0.34 * len(values))
    figure, axis = pyplot.subplots(figsize=size, constrained_layout=True)
    image = axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), [_short_length(c) for c in columns])
    axis.set_yticks(range(len(values)), list(heat_map.rows))
    axis.set_xlabel("tokens of prompt and answer")
    axis.set_ylabel(heat_map.label)
    axis.set_title(heat_map.title)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not np.isnan(value):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axis, label="score, %")
    save_figure(figure, path)


def load_pyplot() -> Any:
    """matplotlib.pyplot without a display; imported where a picture is drawn, since that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure, which appears whole, and close it."""
    temporary = path.with_name(f"{path.name}.tmp.png")
    figure.savefig(temporary, dpi=90)
    load_pyplot().close(figure)
    os.replace(temporary, path)


def _short_length(length: str) -> str:
    """4096 as 4K."""
    tokens = int(length)
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
