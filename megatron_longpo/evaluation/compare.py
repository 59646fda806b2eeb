"""Two or more evaluations side by side: differences with confidence intervals, as table, JSON and picture.

Intervals are percentile bootstrap (Efron 1979) of the difference of means. Where both sides answered the same questions (told by
their digests) a question is drawn with both its answers, so that what makes questions easy or hard cancels (paired); else each
side is drawn by itself. A mean over several tasks or lengths draws within each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation import ruler
from megatron_longpo.evaluation.report import markdown_table, print_table, read_results, save
from megatron_longpo.evaluation.runner import read_rows
from megatron_longpo.runtime.files import write_atomically

DRAWS = 2000
# Suites whose scores are shares; the others' figures stand as they are.
_SHARES = ("ruler", "infinitebench", "needle", "short")


@dataclass(frozen=True)
class Difference:
    """One line of a comparison: an evaluation against the first.

    Attributes:
        suite, name, length: of what; length is ``all`` for a mean over lengths.
        other: which evaluation.
        first_mean, other_mean: of the questions that were compared.
        low, high: 95 % interval of other - first.
        paired: whether both answered the same questions.
        samples: of the first.
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

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        # One question, or changes that are all alike, say nothing of others.
        return (self.low > 0 or self.high < 0) and self.high > self.low


@dataclass(frozen=True)
class Evaluation:
    """One folder, read.

    Attributes:
        name: of the folder.
        scores: suite -> (task, length) -> scores by index with the digest of the question.
        settings: suite -> what its answers depend on.
    """

    name: str
    scores: dict[str, dict[tuple[str, str], dict[str, tuple[float, str]]]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_evaluation(folder: Path) -> Evaluation:
    """Answers of an evaluation.

    Raises:
        ConfigError: the folder holds none, or lacks those of a suite that it reports.
    """
    content = read_results(folder)
    scores: dict[str, dict[tuple[str, str], dict[str, tuple[float, str]]]] = {}
    for suite in content["suites"]:
        for row in read_rows(folder / suite / "samples.jsonl"):
            length = str(row["length"]) if row["length"] else "-"
            cell = scores.setdefault(suite, {}).setdefault((row["task"], length), {})
            cell[row["key"]] = (float(row["score"]), str(row.get("digest")))
        if suite not in scores:
            raise ConfigError(f"{folder / suite / 'samples.jsonl'}: has no answers; evaluate {suite} again")
    if not scores:
        raise ConfigError(f"{folder}: reports no suite; evaluate again")
    return Evaluation(folder.name, scores, {s: of["settings"] for s, of in content["suites"].items()})


# What must be alike, or numbers of a suite mean different things: where it goes by task, for the tasks of both.
_ALIKE = ("version", "harness", "shots", "prompts", "depths", "haystacks", "reference", "beta")


def check_alike(first: Evaluation, other: Evaluation) -> None:
    """Whether what both evaluated was measured alike.

    Raises:
        ConfigError: not.
    """
    for suite, settings in first.settings.items():
        for name in _ALIKE:
            x, y = settings.get(name), other.settings.get(suite, settings).get(name)
            if isinstance(x, dict) and isinstance(y, dict):
                different = [k for k in x if k in y and x[k] != y[k]]
                name, x, y = (
                    (f"{name} of {different[0]}", x[different[0]], y[different[0]]) if different else (name, 0, 0)
                )
            if x != y:
                raise ConfigError(
                    f"{suite} of {first.name} has {name} {x} and that of {other.name} {y}, so their numbers do not compare; "
                    "evaluate one of them again with the other's"
                )


def bootstrap(
    strata: Sequence[tuple[np.ndarray, np.ndarray, bool]], rng: np.random.Generator, draws: int = DRAWS
) -> tuple[float, float, float, float]:
    """Means of both sides and the 95 % interval of the second less the first.

    Args:
        strata: scores of both sides and whether they are paired, one a task and length; each counts alike.
        rng: of the draws.
        draws: how many.

    Returns:
        First mean, second mean, lower and upper bound.
    """
    first = float(np.mean([a.mean() for a, _, _ in strata]))
    second = float(np.mean([b.mean() for _, b, _ in strata]))
    differences = np.zeros(draws)
    for a, b, paired in strata:
        # A hundred draws at a time: MMLU has fourteen thousand questions.
        for start in range(0, draws, 100):
            count = min(100, draws - start)
            drawn = rng.integers(0, len(a), (count, len(a)))
            other = drawn if paired else rng.integers(0, len(b), (count, len(b)))
            differences[start : start + count] += b[other].mean(1) - a[drawn].mean(1)
    low, high = np.percentile(differences / len(strata), [2.5, 97.5])
    return first, second, float(low), float(high)


def compare(evaluations: Sequence[Evaluation], seed: int = 1234) -> list[Difference]:
    """Every evaluation against the first, in what both have."""
    first = evaluations[0]
    result: list[Difference] = []
    for other in evaluations[1:]:
        for suite, cells in first.scores.items():
            common = {key: cells[key] for key in cells if key in other.scores.get(suite, {})}
            if not common:
                continue
            strata = {key: _stratum(of, other.scores[suite][key]) for key, of in common.items()}
            for name, length, keys in _lines(suite, list(common)):
                parts = [strata[key] for key in keys]
                numbers = bootstrap(parts, np.random.default_rng([seed, len(result)]))
                paired, samples = all(p for _, _, p in parts), sum(len(a) for a, _, _ in parts)
                result.append(Difference(suite, name, length, other.name, *numbers, paired, samples))
    return result


def _stratum(
    first: dict[str, tuple[float, str]], other: dict[str, tuple[float, str]]
) -> tuple[np.ndarray, np.ndarray, bool]:
    same = [key for key in first if key in other and first[key][1] == other[key][1]]
    if len(same) == min(len(first), len(other)):
        # What both were asked; further questions of one side say nothing of the difference.
        return np.array([first[k][0] for k in same]), np.array([other[k][0] for k in same]), True
    return np.array([s for s, _ in first.values()]), np.array([s for s, _ in other.values()]), False


def _lines(suite: str, keys: list[tuple[str, str]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Names of the lines of a suite and the cells that each is a mean of."""
    lengths = list(dict.fromkeys(length for _, length in keys))
    tasks = list(dict.fromkeys(task for task, _ in keys))
    lines = []
    if suite != "needle":
        lines += [(task, length, [(task, length)]) for task in tasks for length in lengths if (task, length) in keys]
    if suite == "ruler":
        for group in dict.fromkeys(ruler.GROUPS[t] for t in tasks):
            members = [k for k in keys if ruler.GROUPS[k[0]] == group]
            if len({task for task, _ in members}) == 1:
                # It would be its only task's line again.
                continue
            for length in lengths:
                if part := [k for k in members if k[1] == length]:
                    lines.append((f"{group} (mean)", length, part))
    if suite in _SHARES and (len(tasks) > 1 or suite == "needle"):
        lines += [("average", n, [k for k in keys if k[1] == n]) for n in lengths]
        if len(lengths) > 1:
            lines.append(("average", "all", keys))
    return lines


# --------------------------------------------------------------------------------------------------
# What people see
# --------------------------------------------------------------------------------------------------


def rows_of(differences: Sequence[Difference]) -> list[list[str]]:
    rows = []
    for d in differences:
        scale, digits = (100.0, 1) if d.suite in _SHARES else (1.0, 4)

        def number(value: float, sign: str = "", scale: float = scale, digits: int = digits) -> str:
            return f"{scale * value:{sign}.{digits}f}"

        change = number(d.other_mean - d.first_mean, "+")
        interval = f"[{number(d.low, '+')}, {number(d.high, '+')}]" + (" *" if d.is_clear else "")
        kind = "paired" if d.paired else "unpaired"
        name = f"{d.suite} {d.name}"
        rows.append(
            [
                name,
                d.length,
                d.other,
                number(d.first_mean),
                number(d.other_mean),
                change,
                interval,
                kind,
                str(d.samples),
            ]
        )
    return rows


HEAD = ["what", "tokens", "against", "first", "other", "change", "95 % interval", "kind", "questions"]


def write_comparison(folders: Sequence[Path], output: Path, seed: int = 1234) -> list[Difference]:
    """OUTPUT/comparison.json, comparison.md, comparison.png, and the table on the terminal.

    Raises:
        ConfigError: fewer than two evaluations, or nothing in common.
    """
    if len(folders) < 2:
        raise ConfigError(
            "--compare needs at least two folders; name those that evaluate.py wrote, the first to compare with"
        )
    evaluations = [read_evaluation(folder) for folder in folders]
    names = [e.name for e in evaluations]
    if len(set(names)) < len(names):
        # Folders of one name: by their whole path.
        evaluations = [replace(e, name=str(f)) for f, e in zip(folders, evaluations, strict=True)]
    for other in evaluations[1:]:
        check_alike(evaluations[0], other)
    differences = compare(evaluations, seed)
    if not differences:
        raise ConfigError(f"{' and '.join(map(str, folders))} have no task and length in common; evaluate both alike")
    output.mkdir(parents=True, exist_ok=True)
    content = {
        "first": evaluations[0].name,
        "draws": DRAWS,
        "seed": seed,
        "differences": [{**d.__dict__, "is_clear": d.is_clear} for d in differences],
    }
    write_atomically(output / "comparison.json", (json.dumps(content, indent=2) + "\n").encode())
    rows = rows_of(differences)
    text = [
        f"# {evaluations[0].name} against {', '.join(e.name for e in evaluations[1:])}",
        "",
        *markdown_table(HEAD, rows),
        "",
        "\\* the interval leaves out zero. Shares in percent; intervals by bootstrap, "
        "paired where both answered the same questions. Many lines: one in twenty is marked by chance.",
        "",
        "![comparison](comparison.png)",
        "",
    ]
    write_atomically(output / "comparison.md", "\n".join(text).encode())
    _draw(differences, evaluations[0].name, output / "comparison.png")
    print_table(f"{evaluations[0].name} (first) against the others", HEAD, rows)
    return differences


def _draw(differences: Sequence[Difference], first: str, path: Path) -> None:
    """Changes with their intervals, a line each; shares and other figures on panels of their own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("change in points (percent)", 100.0, [d for d in differences if d.suite in _SHARES]),
        ("change", 1.0, [d for d in differences if d.suite not in _SHARES]),
    ]
    panels = [p for p in panels if p[2]]
    heights = [len(p[2]) for p in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 1.2 * len(panels) + 0.24 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (label, scale, lines) in zip(axes[:, 0], panels, strict=True):
        for y, d in enumerate(lines):
            change = scale * (d.other_mean - d.first_mean)
            # Not green and red: of a loss the fall is good.
            colour = "tab:gray" if not d.is_clear else "tab:blue" if d.low > 0 else "tab:orange"
            axis.plot([scale * d.low, scale * d.high], [y, y], color=colour, linewidth=2)
            axis.plot([change], [y], "o", color=colour, markersize=4)
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
    save(figure, path)
