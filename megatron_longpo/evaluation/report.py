"""What people read of an evaluation: results.json for programs; report.md, tables and pictures for them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation import infinitebench, short_context
from megatron_longpo.runtime.files import waiting_lock, write_atomically

FORMAT = 1


def write_report(output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Put suites into OUTPUT's results.json, beside those that earlier runs put there; write report.md and pictures.

    Args:
        output: folder of the evaluation.
        found: suite -> settings and metrics.

    Returns:
        What results.json holds.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # Another suite may be reported at the same time, by a process of its own.
    with waiting_lock(output):
        content = _content(output)
        for suite, result in found.items():
            content["suites"][suite] = {**result, "finished": stamp}
        _write(output, content)
    return content


def forget(output: Path, suites: Sequence[str]) -> None:
    """Take suites out of OUTPUT's report: they are begun again."""
    with waiting_lock(output):
        content = _content(output)
        kept = {name: result for name, result in content["suites"].items() if name not in suites}
        if kept != content["suites"]:
            _write(output, {**content, "suites": kept})


def _content(output: Path) -> dict[str, Any]:
    return read_results(output) if (output / "results.json").exists() else {"format": FORMAT, "suites": {}}


def _write(output: Path, content: dict[str, Any]) -> None:
    write_atomically(output / "results.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    for suite, result in content["suites"].items():
        draw(suite, result["metrics"], output)
    write_atomically(output / "report.md", markdown(content).encode())


def read_results(output: Path) -> dict[str, Any]:
    """results.json of an evaluation.

    Raises:
        ConfigError: there is none that can be read.
    """
    path = output / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["suites"], dict):
            raise ValueError(f"format {content['format']}")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name a folder that evaluate.py wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no result of this version ({error}); evaluate again") from None
    return dict(content)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _cell(of: dict[str, Any] | None) -> str:
    if of is None:
        return "-"
    error = "" if of["stderr"] is None else f" ± {100 * of['stderr']:.1f}"
    return percent(of["score"]) + error


def tables(suite: str, metrics: dict[str, Any]) -> list[Table]:
    """Title, head and rows of each table of a suite; scores in percent with their standard errors."""
    if suite == "ruler":
        lengths = list(metrics["average"])
        tasks = [[t, *(_cell(of.get(n)) for n in lengths)] for t, of in metrics["tasks"].items()]
        groups = [
            [g, *(percent(of[n]) for n in lengths), percent(metrics["over_lengths"][g])]
            for g, of in metrics["groups"].items()
        ]
        average = [
            "average",
            *(percent(metrics["average"][n]) for n in lengths),
            percent(metrics["over_lengths"]["average"]),
        ]
        return [
            ("RULER by group", ["group", *lengths, "all lengths"], [*groups, average]),
            ("RULER by task", ["task", *lengths], tasks),
        ]
    if suite == "needle":
        lengths = sorted({n for of in metrics["depths"].values() for n in of}, key=int)
        rows = [
            [f"{d} %", *(percent(of[n]["score"] if n in of else None) for n in lengths)]
            for d, of in metrics["depths"].items()
        ]
        return [("Needle map: found, by depth and length", ["depth", *lengths], rows)]
    if suite == "infinitebench":
        lengths = list(metrics["average"])
        rows = [[infinitebench.TITLES[t], *(_cell(of.get(n)) for n in lengths)] for t, of in metrics["tasks"].items()]
        rows.append(["average", *(percent(metrics["average"][n]) for n in lengths)])
        return [("InfiniteBench, cut to so many tokens", ["task", *lengths], rows)]
    if suite == "short":
        rows = [
            [
                f"{short_context.SHORT[t].title} ({short_context.SHORT[t].shots}-shot, {short_context.SHORT[t].metric})",
                _cell(of),
                str(of["samples"]),
            ]
            for t, of in metrics["tasks"].items()
        ]
        return [
            ("Short context", ["task", "score", "questions"], [*rows, ["average", percent(metrics["average"]), ""]])
        ]
    bins = metrics["by_length"]
    names = [n for n in metrics if n not in ("samples", "by_length")]
    rows = [[n, f"{metrics[n]:.4f}", *(f"{of[n]:.4f}" for of in bins.values())] for n in names]
    rows.insert(0, ["samples", str(metrics["samples"]), *(str(of["samples"]) for of in bins.values())])
    return [("Held-out preferences", ["figure", "all", *(f"to {b} tokens" for b in bins)], rows)]


def refusals(metrics: dict[str, Any]) -> int:
    """Answers that the engine refused to give, which count as wrong."""
    total = 0
    waiting: list[Any] = [metrics.get("tasks"), metrics.get("depths")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            total += value.get("refused", 0) if "score" in value else 0
            waiting += [v for v in value.values() if isinstance(v, dict)]
    return total


def markdown(content: dict[str, Any]) -> str:
    """All tables of an evaluation, and what they are of."""
    lines = ["# Evaluation", ""]
    for suite, result in content["suites"].items():
        for title, head, rows in tables(suite, result["metrics"]):
            lines += [f"## {title}", "", *markdown_table(head, rows), ""]
        if refused := refusals(result["metrics"]):
            lines += [f"{refused} answer(s) were refused by the engine and count as wrong.", ""]
        if suite in ("ruler", "needle"):
            lines += [f"![{suite}]({suite}.png)", ""]
        settings = json.dumps(result["settings"], ensure_ascii=False)
        lines += [f"Settings: `{settings}`", ""]
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def show(suite: str, metrics: dict[str, Any]) -> None:
    """The first table of a suite, on the terminal."""
    title, head, rows = tables(suite, metrics)[0]
    print_table(title, head, rows)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(head[0], title=title)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, 14 * len(head))).print(table)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def draw(suite: str, metrics: dict[str, Any], output: Path) -> None:
    """SUITE.png, where a suite has one."""
    if suite == "ruler":
        rows = {t: {n: c["score"] for n, c in of.items()} for t, of in metrics["tasks"].items()}
        rows["average"] = metrics["average"]
        heat_map(rows, list(metrics["average"]), output / "ruler.png", "RULER", "task")
    elif suite == "needle":
        rows = {f"{d} %": {n: c["score"] for n, c in of.items()} for d, of in metrics["depths"].items()}
        lengths = sorted({n for of in rows.values() for n in of}, key=int)
        title = f"Needle in a haystack: {percent(metrics['average']['score'])} % found"
        heat_map(rows, lengths, output / "needle.png", title, "depth of the needle")


def heat_map(rows: dict[str, dict[str, Any]], columns: Sequence[str], path: Path, title: str, label: str) -> None:
    """Scores as colours with their numbers in percent: a line a row, a column a length in tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    values = np.array(
        [[np.nan if of.get(c) is None else 100 * of[c] for c in columns] for of in rows.values()], dtype=float
    )
    size = (max(5.0, 2.4 + 0.9 * len(columns)), 1.6 + 0.34 * len(rows))
    figure, axis = pyplot.subplots(figsize=size, constrained_layout=True)
    image = axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), [_short(c) for c in columns])
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xlabel("tokens of prompt and answer")
    axis.set_ylabel(label)
    axis.set_title(title)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not np.isnan(value):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axis, label="score, %")
    save(figure, path)


def _short(length: str) -> str:
    n = int(length)
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def save(figure: Any, path: Path) -> None:
    """A picture appears whole."""
    from matplotlib import pyplot

    temporary = path.with_name(f"{path.name}.tmp.png")
    figure.savefig(temporary, dpi=90)
    pyplot.close(figure)
    os.replace(temporary, path)
