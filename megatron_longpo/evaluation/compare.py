"""Two or more evaluations side by side: differences with confidence intervals, as table, JSON and picture.

Intervals are percentile bootstrap intervals (Efron 1979) of the difference of means. If both sides answered the same questions,
as their digests show, a question is drawn together with both its answers, so that its difficulty cancels (paired); otherwise each
side is drawn by itself. A mean over several tasks or lengths draws within each of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.evaluation.folder import read_rows
from megatron_longpo.evaluation.registry import suite_of
from megatron_longpo.evaluation.report import load_pyplot, save_figure
from megatron_longpo.evaluation.results import read_results
from megatron_longpo.evaluation.samples import why_no_answer
from megatron_longpo.evaluation.suites.base import Cell
from megatron_longpo.runtime.checked_json import read_checked, write_checked
from megatron_longpo.runtime.files import sha256_of, write_atomically
from megatron_longpo.runtime.tables import Table
from megatron_longpo.schema import convert_fields

_COMPARISON = "comparison.json"
DRAWS = 2000
INTERVAL_PERCENT = (2.5, 97.5)
# Drawn at a time: MMLU has fourteen thousand questions, so all draws at once would take gigabytes.
_DRAWS_AT_ONCE = 100
_HEAD = ("what", "tokens", "against", "first", "other", "change", "95 % interval", "kind", "questions")
# A further column where questions have no answer.
_NO_ANSWER = "no answer: first, other"


@dataclass(frozen=True)
class QuestionScore:
    """A question's score, the digest of the question, and why it has no answer, if it has none."""

    score: float
    digest: str
    no_answer: str | None = None


# Key -> score.
Scores = dict[str, QuestionScore]


@dataclass(frozen=True)
class Evaluation:
    """One output folder.

    Attributes:
        name: name of the folder.
        scores: suite -> cell -> scores.
        settings: suite -> what its answers depend on.
    """

    name: str
    scores: dict[str, dict[Cell, Scores]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One line of a comparison: an evaluation against the first one.

    Attributes:
        suite, name, length: what is compared; ``length`` is ``all`` for a mean over lengths.
        other: name of the other evaluation.
        first_mean, other_mean: means over the questions that are compared.
        low, high: 95 % interval of other - first.
        paired: whether both answered the same questions.
        samples: number of questions of the first.
        first_no_answer, other_no_answer: number of those questions that have no answer, and so count as wrong.
    """

    suite: str
    name: str
    length: str
    other: str
    first_mean: float
    other_mean: float
    low: float
    high: float
    paired: bool
    samples: int
    first_no_answer: int = 0
    other_no_answer: int = 0

    @property
    def change(self) -> float:
        return self.other_mean - self.first_mean

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        # A single question, or changes that are all equal, say nothing about other questions.
        return (self.low > 0 or self.high < 0) and self.high > self.low


def read_evaluation(folder: Path) -> Evaluation:
    """Read the answers of an evaluation.

    Raises:
        ConfigError: the folder reports no suite, or lacks the answers of one.
    """
    content = read_results(folder)
    scores: dict[str, dict[Cell, Scores]] = {}
    for suite, result in content["suites"].items():
        fractions = suite_of(suite, f"{folder}/results.json").in_percent
        path = folder / suite / "samples.jsonl"
        # Version 0.1.0 wrote no checksum.
        if path.exists() and result.get("samples_sha256") not in (None, sha256_of(path)):
            raise ConfigError(f"{path}: does not have the checksum in results.json; evaluate {suite} again")
        damaged: list[str] = []
        for row in read_rows(path, fractions=fractions, damaged=damaged):
            if not isinstance(row.get("task"), str) or not isinstance(row.get("length"), int):
                damaged.append(f"{row['key']}: it has no task or length")
                continue
            cell = Cell(row["task"], str(row["length"]) if row["length"] else "-")
            of_cell = scores.setdefault(suite, {}).setdefault(cell, {})
            of_cell[row["key"]] = QuestionScore(float(row["score"]), str(row.get("digest")), why_no_answer(row))
        if damaged:
            raise ConfigError(f"{path}: {damaged[0]}; evaluate {suite} again")
        if suite not in scores:
            raise ConfigError(f"{folder / suite / 'samples.jsonl'}: has no answers; evaluate {suite} again")
    if not scores:
        raise ConfigError(f"{folder}: reports no suite; evaluate again")
    return Evaluation(folder.name, scores, {name: suite["settings"] for name, suite in content["suites"].items()})


def check_alike(first: Evaluation, other: Evaluation) -> None:
    """Check that both evaluations measured the same way: the settings that a suite calls alike, for the tasks that both have.

    Raises:
        ConfigError: they did not.
    """
    for name in [name for name in first.settings if name in other.settings]:
        for setting in suite_of(name, "results.json").settings_alike:
            x, y = first.settings[name].get(setting), other.settings[name].get(setting)
            label = setting
            if isinstance(x, dict) and isinstance(y, dict):
                task = next((task for task in x if task in y and x[task] != y[task]), None)
                if task is None:
                    continue
                label, x, y = f"{setting} of {task}", x[task], y[task]
            if x != y:
                raise ConfigError(
                    f"{name} of {first.name} has {label} {x} and that of {other.name} {y}, so their numbers are not "
                    "comparable; evaluate one of them again with the other's"
                )


# --------------------------------------------------------------------------------------------------
# Differences
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stratum:
    """Scores of both sides in one task and length.

    Attributes:
        first: [questions] scores of the first evaluation.
        other: [questions] scores of the other one.
        paired: whether both arrays are about the same questions, in the same order.
        first_no_answer, other_no_answer: number of questions without an answer.
    """

    first: np.ndarray
    other: np.ndarray
    paired: bool
    first_no_answer: int = 0
    other_no_answer: int = 0

    @classmethod
    def of(cls, first: Sequence[QuestionScore], other: Sequence[QuestionScore], *, paired: bool) -> Stratum:
        """The stratum of some answers."""
        return cls(
            first=np.array([question.score for question in first]),
            other=np.array([question.score for question in other]),
            paired=paired,
            first_no_answer=sum(question.no_answer is not None for question in first),
            other_no_answer=sum(question.no_answer is not None for question in other),
        )


@dataclass(frozen=True)
class Bootstrap:
    """Means of both sides, and the 95 % interval of other - first."""

    first_mean: float
    other_mean: float
    low: float
    high: float


def bootstrap(strata: Sequence[Stratum], rng: np.random.Generator, draws: int = DRAWS) -> Bootstrap:
    """Bootstrap the difference of means.

    Args:
        strata: scores per task and length; each stratum has the same weight.
        rng: random generator of the draws.
        draws: number of draws.
    """
    differences = np.zeros(draws)
    for stratum in strata:
        first, other = stratum.first, stratum.other
        for start in range(0, draws, _DRAWS_AT_ONCE):
            count = min(_DRAWS_AT_ONCE, draws - start)
            drawn = rng.integers(0, len(first), (count, len(first)))
            drawn_other = drawn if stratum.paired else rng.integers(0, len(other), (count, len(other)))
            differences[start : start + count] += other[drawn_other].mean(1) - first[drawn].mean(1)
    low, high = np.percentile(differences / len(strata), INTERVAL_PERCENT)
    return Bootstrap(
        first_mean=float(np.mean([stratum.first.mean() for stratum in strata])),
        other_mean=float(np.mean([stratum.other.mean() for stratum in strata])),
        low=float(low),
        high=float(high),
    )


def compare(evaluations: Sequence[Evaluation], seed: int = 1234) -> list[Difference]:
    """Compare every evaluation with the first one, in the tasks and lengths that both have.

    Args:
        evaluations: at least two.
        seed: seed of the bootstrap.
    """
    first = evaluations[0]
    differences: list[Difference] = []
    for other in evaluations[1:]:
        for suite, cells in first.scores.items():
            common = [cell for cell in cells if cell in other.scores.get(suite, {})]
            if not common:
                continue
            strata = {cell: _stratum(cells[cell], other.scores[suite][cell]) for cell in common}
            for line in suite_of(suite, "results.json").comparison_lines(common):
                parts = [strata[cell] for cell in line.cells]
                found = bootstrap(parts, np.random.default_rng([seed, len(differences)]))
                differences.append(
                    Difference(
                        suite=suite,
                        name=line.name,
                        length=line.length,
                        other=other.name,
                        first_mean=found.first_mean,
                        other_mean=found.other_mean,
                        low=found.low,
                        high=found.high,
                        paired=all(part.paired for part in parts),
                        samples=sum(len(part.first) for part in parts),
                        first_no_answer=sum(part.first_no_answer for part in parts),
                        other_no_answer=sum(part.other_no_answer for part in parts),
                    )
                )
    return differences


def _stratum(first: Mapping[str, QuestionScore], other: Mapping[str, QuestionScore]) -> Stratum:
    same = [key for key in first if key in other and first[key].digest == other[key].digest]
    if len(same) == min(len(first), len(other)):
        # One side was asked all of these. Further questions of the other side say nothing about the difference.
        return Stratum.of([first[key] for key in same], [other[key] for key in same], paired=True)
    return Stratum.of(list(first.values()), list(other.values()), paired=False)


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def write_comparison(folders: Sequence[Path], output: Path, seed: int = 1234) -> list[Difference]:
    """Write OUTPUT/comparison.json, comparison.md and comparison.png, and print the table.

    Args:
        folders: output folders of evaluations; the others are compared with the first.
        output: where to write.
        seed: seed of the bootstrap.

    Raises:
        ConfigError: fewer than two evaluations, they are not comparable, or they have nothing in common.
    """
    if len(folders) < 2:
        raise ConfigError(
            "--compare needs at least two folders; name those that evaluate.py wrote, the first to compare with"
        )
    evaluations = [read_evaluation(folder) for folder in folders]
    if len({e.name for e in evaluations}) < len(evaluations):
        # Folders of the same name are told apart by their paths.
        evaluations = [replace(e, name=str(folder)) for folder, e in zip(folders, evaluations, strict=True)]
    first, others = evaluations[0].name, ", ".join(e.name for e in evaluations[1:])
    for other in evaluations[1:]:
        check_alike(evaluations[0], other)
    differences = compare(evaluations, seed)
    if not differences:
        raise ConfigError(
            f"{' and '.join(map(str, folders))} have no task and length in common; evaluate both with the same options"
        )
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "first": first,
        "draws": DRAWS,
        "seed": seed,
        "differences": [{**dataclasses.asdict(d), "is_clear": d.is_clear} for d in differences],
    }
    write_checked(output / _COMPARISON, content)
    table = _table(f"{first} (first) against the others", differences)
    text = [
        f"# {first} against {others}",
        "",
        *table.markdown(),
        "",
        "\\* the interval leaves out zero. Shares in percent; intervals by bootstrap, "
        "paired where both answered the same questions. Many lines: one in twenty is marked by chance."
        + (" Questions without an answer count as wrong." if _NO_ANSWER in table.head else ""),
        "",
        "![comparison](comparison.png)",
        "",
    ]
    write_atomically(output / "comparison.md", "\n".join(text).encode())
    _draw(differences, first, output / "comparison.png")
    table.print()
    return differences


def read_comparison(folder: Path) -> list[Difference]:
    """Read the lines of FOLDER/comparison.json.

    Raises:
        DataError: the file is missing or damaged, or is not a comparison.
    """
    path = folder / _COMPARISON
    try:
        lines = read_checked(path)["differences"]
        found = []
        for line in lines:
            content = {key: value for key, value in line.items() if key != "is_clear"}
            difference = Difference(**convert_fields(Difference, content, "", DataError))
            figures = (difference.first_mean, difference.other_mean, difference.low, difference.high)
            if not all(map(math.isfinite, figures)):
                raise ValueError(f"{difference.suite} {difference.name} has figures that are not finite")
            found.append(difference)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        raise DataError(f"{path}: is not a comparison ({error}); compare the evaluations again") from None


def _table(title: str, differences: Sequence[Difference]) -> Table:
    rows = [_row(d) for d in differences]
    if not any(d.first_no_answer or d.other_no_answer for d in differences):
        return Table(title, _HEAD, rows)
    counts = [f"{d.first_no_answer}, {d.other_no_answer}" for d in differences]
    return Table(title, (*_HEAD, _NO_ANSWER), [[*row, count] for row, count in zip(rows, counts, strict=True)])


def _row(d: Difference) -> list[str]:
    """Line of the table; shares in percent."""
    scale, digits = (100.0, 1) if _in_percent(d) else (1.0, 4)

    def number(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}.{digits}f}"

    interval = f"[{number(d.low, '+')}, {number(d.high, '+')}]" + (" *" if d.is_clear else "")
    return [
        f"{d.suite} {d.name}",
        d.length,
        d.other,
        number(d.first_mean),
        number(d.other_mean),
        number(d.change, "+"),
        interval,
        "paired" if d.paired else "unpaired",
        str(d.samples),
    ]


def _in_percent(d: Difference) -> bool:
    return suite_of(d.suite, "results.json").in_percent


def _draw(differences: Sequence[Difference], first: str, path: Path) -> None:
    """Draw changes with their intervals, a line each; shares and other metrics in panels of their own."""
    panels = [
        ("change in points (percent)", 100.0, [d for d in differences if _in_percent(d)]),
        ("change", 1.0, [d for d in differences if not _in_percent(d)]),
    ]
    panels = [panel for panel in panels if panel[2]]
    heights = [len(lines) for _, _, lines in panels]
    figure, axes = load_pyplot().subplots(
        len(panels),
        1,
        figsize=(9, 1.2 * len(panels) + 0.24 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (label, scale, lines) in zip(axes[:, 0], panels, strict=True):
        for y, d in enumerate(lines):
            # Not green and red: a loss that falls is good.
            colour = "tab:gray" if not d.is_clear else "tab:blue" if d.low > 0 else "tab:orange"
            axis.plot([scale * d.low, scale * d.high], [y, y], color=colour, linewidth=2)
            axis.plot([scale * d.change], [y], "o", color=colour, markersize=4)
        named = len({d.other for d in lines}) > 1
        axis.set_yticks(
            range(len(lines)),
            [f"{d.suite} {d.name} {d.length}" + (f" ({d.other})" if named else "") for d in lines],
            fontsize=7,
        )
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{label} from {first}, 95 % interval")
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
