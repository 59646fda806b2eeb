"""One page about all rounds, without references to other files: data, curves, evaluations before and after, gates, cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_longpo.data.indexed import read_manifest
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.evaluation.compare import Difference, read_comparison
from megatron_longpo.evolution.gate import described
from megatron_longpo.evolution.plan import Planner, RoundFolder
from megatron_longpo.evolution.settings import Evolution, Round
from megatron_longpo.evolution.status import StageStatus, read_status, time_in_words
from megatron_longpo.runtime.checked_json import read_checked
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.training.metrics import read_metrics

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_METRICS = ("loss", "nll", "preference", "rewards/accuracies", "rewards/margins", "tokens_per_second")
_HELD_OUT = ("nll", "rewards/accuracies", "rewards/margins", "kl/rejected")


def write_report(planner: Planner, path: Path) -> None:
    """Write the page. What is not there yet is left out.

    Args:
        planner: planner of the rounds.
        path: file of the page.
    """
    evolution = planner.evolution
    statuses = read_status(planner)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=evolution.output.name,
        model=evolution.evolve.model,
        overview=_overview(planner),
        rounds=[_round(planner.folder(round_.name), round_, evolution) for round_ in evolution.rounds],
        cost=_cost(statuses),
        hours=sum(status.process_hours for status in statuses),
        dollars=evolution.evolve.dollars_per_process_hour,
        config=evolution.source.read_text(encoding="utf-8"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _overview(planner: Planner) -> list[Sequence[str]]:
    """A row per round, method and average: before, after, change with its interval."""
    rows: list[Sequence[str]] = []
    for round_ in planner.evolution.rounds:
        for line in _differences(planner.folder(round_.name)):
            if line.name == "average" or line.suite in ("needle", "preference"):
                rows.append([round_.name, line.other, *_line(line)])
    return rows


def _line(line: Difference) -> list[str]:
    """A line of a comparison, as texts."""
    fractions = line.suite != "preference"
    scale, digits = (100.0, 1) if fractions else (1.0, 4)
    interval = f"[{scale * line.low:+.{digits}f}, {scale * line.high:+.{digits}f}]"
    return [
        f"{line.suite} {line.name}",
        line.length,
        f"{scale * line.first_mean:.{digits}f}",
        f"{scale * line.other_mean:.{digits}f}",
        f"{scale * line.change:+.{digits}f}",
        interval + (" *" if line.is_clear else ""),
        str(line.samples),
    ]


def _round(folder: RoundFolder, round_: Round, evolution: Evolution) -> dict[str, Any]:
    """What the template shows of a round."""
    methods = []
    for method in evolution.methods:
        run = folder.run(method)
        methods.append(
            {
                "name": method,
                "training": _first_and_last(read_metrics(run / "metrics.jsonl"), _METRICS, thirds=True),
                "held_out": _first_and_last(read_metrics(run / "validation.jsonl"), _HELD_OUT, thirds=False),
                "curves": _png(run / "curves.png"),
                "pictures": _pictures(folder.evaluation(method)),
            }
        )
    return {
        "name": round_.name,
        "data": _data(folder),
        "lengths": _png(Path(f"{folder.data}.lengths.png")),
        "methods": methods,
        "before": _pictures(folder.before),
        "comparison": [[line.other, *_line(line)] for line in _differences(folder)],
        "comparison_picture": _png(folder.comparison / "comparison.png"),
        "gate": described(folder.gate),
    }


def _data(folder: RoundFolder) -> list[Sequence[str]]:
    """Counts of the pairs and of the data."""
    rows: list[Sequence[str]] = []
    report = Path(f"{folder.pairs}.report") / "report.json"
    if report.exists():
        try:
            content = read_checked(report)
            rows += [[str(name), f"{count:,}"] for name, count in content["counts"].items()]
            rows += [[f"skipped: {reason}", f"{count:,}"] for reason, count in content["reasons"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{report}: cannot be read ({one_line(error)}); remove it, or merge the parts of the generation again"
            ) from None
    for title, prefix in (("trained on", folder.data), ("held out", folder.held_out)):
        if Path(f"{prefix}.json").exists():
            manifest = read_manifest(prefix)
            rows += [
                [f"{title}: {key}", f"{getattr(manifest, key):,}"] for key in ("samples", "turns", "tokens", "longest")
            ]
    return rows


def _first_and_last(lines: Sequence[Mapping[str, Any]], names: Sequence[str], *, thirds: bool) -> list[Sequence[str]]:
    """Means over the first and the last third of the lines, or the first and the last line."""
    if not lines:
        return []
    count = max(1, len(lines) // 3) if thirds else 1
    rows: list[Sequence[str]] = []
    for name in names:
        values = [line[name] for line in lines if isinstance(line.get(name), (int, float))]
        if values:
            first, last = values[:count], values[-count:]
            rows.append([name, f"{sum(first) / len(first):.4g}", f"{sum(last) / len(last):.4g}"])
    return rows


def _cost(statuses: Sequence[StageStatus]) -> list[Sequence[str]]:
    return [
        [
            status.stage.id,
            status.word,
            time_in_words(status.record.seconds),
            str(status.record.processes),
            f"{status.process_hours:.2f}",
            str(status.record.attempts),
        ]
        for status in statuses
        if status.record is not None
    ]


def _differences(folder: RoundFolder) -> list[Difference]:
    return read_comparison(folder.comparison) if folder.comparison.exists() else []


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """Names and contents of an evaluation's pictures."""
    return [(path.stem, _png(path)) for path in sorted(folder.glob("*.png"))]


def _png(path: Path) -> str:
    """A PNG in base64; empty if there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
