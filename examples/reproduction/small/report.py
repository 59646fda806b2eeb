"""Tables and figures of the reproduction, from the evaluations' own files.

F/results.md, F/results.json, F/results.png (the main methods), F/results_all.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.evaluation.scoring import token_f1

# Lengths up to which the model is made.
SHORT = 512
DRAWS = 2000
# Methods of the short figure.
MAIN = ("model", "rope-only", "longpo", "low-beta", "sft", "dpo")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval over questions, of which each is the mean over the seeds' models."""

    mean: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True)
class Result:
    """One model, or the same method's models of several seeds.

    Attributes:
        round: round that made it; empty for the models before.
        method: method, or what was done instead.
        seeds: number of models.
        exact_match, f1, needle, ruler: length -> score (ruler: over its tasks).
        short, long: exact match over the lengths up to 512 tokens, and over those beyond, up to the round's (for the model
            before any round, whose RoPE is as it was: all).
        perplexity: that of the held-out dialogues of at most 512 tokens, the geometric mean over seeds.
    """

    round: str
    method: str
    seeds: int
    exact_match: dict[int, Interval]
    f1: dict[int, Interval]
    needle: dict[int, Interval]
    ruler: dict[int, Interval]
    short: Interval | None
    long: Interval | None
    perplexity: float | None


@dataclass(frozen=True)
class Difference:
    """LongPO's exact match minus another method's, with paired intervals over questions (seeds are held fixed).

    Attributes:
        round: round.
        method: the other method.
        seeds: seeds that both were trained with.
        short, long: over the lengths up to 512 tokens, and over those beyond, up to the round's.
        short_by_seed, long_by_seed: the same for each seed.
    """

    round: str
    method: str
    seeds: int
    short: Interval | None
    long: Interval | None
    short_by_seed: tuple[float, ...]
    long_by_seed: tuple[float, ...]


def write(folder: Path) -> None:
    """Write the tables and the figure of what is there."""
    found = results(folder)
    against = differences(folder)
    content = {
        "results": [asdict(result) for result in found],
        "differences": [asdict(difference) for difference in against],
        "seconds": _read(folder / "seconds.json"),
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(tables(found, against), encoding="utf-8")
    if found:
        draw([result for result in found if result.method in MAIN], folder / "results.png")
        draw(found, folder / "results_all.png")
    print(f"{folder / 'results.md'}, results.json, results.png, results_all.png: {len(found)} models", flush=True)


def results(folder: Path) -> list[Result]:
    """Results of all evaluations below a folder that are there."""
    found = []
    perplexities = folder / "perplexity"
    for path in sorted((folder / "examined").glob("*/results.json"), key=lambda p: (p.parent.name != "model", str(p))):
        if path.parent.name.startswith("seed"):
            continue
        found.append(_result("", path.parent.name, [path.parent], perplexities))
    names = _rounds(folder)
    if names and not (folder / "examined" / "model").exists():
        found.insert(
            0, _result("", "model", sorted((folder / "rounds").glob(f"*/{names[0]}/before"))[:1], perplexities)
        )
    for name in names:
        for method, folders in _evaluations(folder, name).items():
            found.append(_result(name, method, [*folders.values()], perplexities))
    return found


def _rounds(folder: Path) -> list[str]:
    """Names of the rounds that were begun, shortest first."""
    return sorted({path.parent.name for path in (folder / "rounds").glob("*/*/pairs.jsonl")}, key=_length)


def _evaluations(folder: Path, round_: str) -> dict[str, dict[str, Path]]:
    """Method -> seed -> evaluation; first of the model that the round began with, with the round's RoPE and nothing else."""
    found: dict[str, dict[str, Path]] = {}
    examined = folder / "examined"
    for root in sorted((folder / "rounds").glob(f"*/{round_}")):
        seed = root.parent.name
        # The first round's is the same for all seeds.
        for stretched in (examined / f"{seed}-rope-{round_}", examined / f"rope-{round_}"):
            is_of_round = stretched.name.startswith("seed") or round_ == _rounds(folder)[0]
            if is_of_round and (stretched / "results.json").exists():
                found.setdefault("rope-only", {})[seed] = stretched
                break
        for path in sorted(root.glob("*/*/results.json")):
            name = path.parent.name
            # Others are what was made again since.
            if path.parent.parent.name == name:
                found.setdefault(name, {})[seed] = path.parent
    return found


def differences(folder: Path) -> list[Difference]:
    """LongPO against every other method of its round, question by question, over the seeds that both have.

    Raises:
        SystemExit: two evaluations have different questions.
    """
    found = []
    for round_ in _rounds(folder):
        of_method = _evaluations(folder, round_)
        ours = of_method.pop("longpo", {})
        for method, theirs in of_method.items():
            seeds = sorted({*ours} & {*theirs})
            changes = [_changes(ours[seed], theirs[seed], _length(round_)) for seed in seeds]
            parts = []
            for part in range(2):
                # [seeds, questions]
                each = np.array([change[part] for change in changes])
                by_seed = tuple(float(mean) for mean in each.mean(1)) if each.size else ()
                parts.append((interval(each.mean(0)) if each.size else None, by_seed))
            (short, short_of_seed), (long, long_of_seed) = parts
            found.append(Difference(round_, method, len(seeds), short, long, short_of_seed, long_of_seed))
    return found


def _changes(ours: Path, theirs: Path, longest: int) -> tuple[list[float], list[float]]:
    """Differences of two models' scores by question: of lengths up to 512 tokens, and of those beyond, up to the round's."""
    first, second = ({row["key"]: row for row in _rows(path / "qa" / "samples.jsonl")} for path in (ours, theirs))
    if first.keys() != second.keys():
        raise SystemExit(f"error: {ours} and {theirs} were asked different questions; evaluate both on the same ones")
    short, long = [], []
    for key in sorted(first):
        change = first[key]["score"] - second[key]["score"]
        if first[key]["length"] <= SHORT:
            short.append(change)
        elif first[key]["length"] <= longest:
            long.append(change)
    return short, long


def _length(name: str) -> int:
    """Tokens of a round's name such as 4K."""
    return int(name[:-1]) * 1024 if name.endswith("K") else int(name)


def _result(round_: str, method: str, folders: Sequence[Path], perplexities: Path) -> Result:
    """The result of one method's evaluations."""
    questions = [_rows(folder / "qa" / "samples.jsonl") for folder in folders]
    needles, ruler = ([_rows(folder / suite / "samples.jsonl") for folder in folders] for suite in ("needle", "ruler"))
    lengths = sorted({row["length"] for rows in questions for row in rows})
    # A model whose RoPE was changed for a round is measured by that round's length too.
    of_round = round_ or (method.removeprefix("rope-") if method.startswith("rope-") else "")
    longest = _length(of_round) if of_round else max(lengths, default=0)
    exact = {n: _scores(questions, [n], lambda row: row["score"]) for n in lengths}
    beyond = [n for n in lengths if SHORT < n <= longest]
    within = [n for n in lengths if n <= SHORT]
    return Result(
        round=round_,
        method=method,
        seeds=len(folders),
        exact_match={n: interval(scores) for n, scores in exact.items()},
        f1={
            n: interval(_scores(questions, [n], lambda row: token_f1(row["answer"], row["references"])))
            for n in lengths
        },
        needle=_by_length(needles),
        ruler=_by_length(ruler),
        short=interval(np.concatenate([exact[n] for n in within])) if within else None,
        long=interval(np.concatenate([exact[n] for n in beyond])) if beyond else None,
        perplexity=_perplexity([perplexities / _name_of(folder) for folder in folders]),
    )


def _by_length(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, Interval]:
    lengths = sorted({row["length"] for rows in seeds for row in rows})
    return {n: interval(_scores(seeds, [n], lambda row: row["score"])) for n in lengths}


def _name_of(evaluation: Path) -> str:
    """Name of an evaluated model's perplexity: ``seed1-1K-longpo``, ``rope-1K``, ``model``."""
    if evaluation.parent.name == "examined":
        return evaluation.name
    if evaluation.name == "before":
        return "model"
    return "-".join(evaluation.parts[-4:-1])


def _perplexity(folders: Sequence[Path]) -> float | None:
    """Geometric mean of the perplexities of some models; None if one is not there."""
    found = [_read(folder / "results.json") for folder in folders]
    if not all(found):
        return None
    return float(np.exp(np.mean([content["suites"]["preference"]["metrics"]["nll"] for content in found])))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scores(seeds: Sequence[Sequence[Mapping[str, Any]]], lengths: Sequence[int], score: Any) -> np.ndarray:
    """[questions] mean over the seeds' models of each question's score."""
    of_question: dict[str, list[float]] = {}
    for rows in seeds:
        for row in rows:
            if row["length"] in lengths:
                of_question.setdefault(row["key"], []).append(score(row))
    return np.array([np.mean(of_question[key]) for key in sorted(of_question)])


def interval(scores: np.ndarray) -> Interval:
    """Mean of scores, with its interval."""
    rng = np.random.default_rng(1234)
    means = scores[rng.integers(0, len(scores), (DRAWS, len(scores)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(scores.mean()), float(low), float(high), len(scores))


# --------------------------------------------------------------------------------------------------
# Showing
# --------------------------------------------------------------------------------------------------


def tables(found: Sequence[Result], against: Sequence[Difference] = ()) -> str:
    """The tables in Markdown."""
    lengths = sorted({n for result in found for n in result.exact_match})
    head = ["round", "model", "seeds"]
    parts = [
        _table(
            "Held-out questions, exact match in percent (95 % interval)",
            [*head, *map(str, lengths), f"to {SHORT}", "beyond", "perplexity"],
            [
                [
                    *_head(r),
                    *(_text(r.exact_match.get(n)) for n in lengths),
                    _text(r.short),
                    _text(r.long),
                    _number(r.perplexity),
                ]
                for r in found
            ],
        ),
        _table(
            "Held-out questions, F1 in percent",
            [*head, *map(str, lengths)],
            [[*_head(r), *(_text(r.f1.get(n)) for n in lengths)] for r in found],
        ),
        _table(
            "Needle map, found in percent",
            [*head, *map(str, lengths)],
            [[*_head(r), *(_text(r.needle.get(n)) for n in lengths)] for r in found],
        ),
        _table(
            "RULER (niah_single_1, niah_single_2, niah_multikey_1), found in percent",
            [*head, *map(str, lengths)],
            [[*_head(r), *(_text(r.ruler.get(n)) for n in lengths)] for r in found],
        ),
        _table(
            "LongPO minus another method on the same questions, exact match in points (95 % interval over questions)",
            ["round", "method", "seeds", f"to {SHORT}", "by seed", "beyond", "by seed"],
            [
                [
                    *(d.round, d.method, str(d.seeds)),
                    *(_text(d.short), _points(d.short_by_seed), _text(d.long), _points(d.long_by_seed)),
                ]
                for d in against
            ],
        ),
    ]
    note = (
        "Every method of a round begins with the model of the one before it, which is LongPO's from the second round on. "
        "rope-only is that model with the round's RoPE and no training; rope-2K and rope-4K are the first model with theirs.\n"
    )
    return "\n".join([note, *parts])


def show(folder: Path) -> None:
    """Print what a round changed: scores by length, held-out pairs, and the answers to five questions about long texts.

    The questions are the first of each kind about texts of the round's length, five of them: none is chosen by its answers.

    Args:
        folder: folder of run.py, with at least one finished round.
    """
    from rich.console import Console
    from rich.table import Table

    gates = sorted((folder / "rounds").glob("*/*/gate.json"), key=lambda p: (_length(p.parent.name), str(p)))
    if not gates:
        return
    first, name = gates[0].parent, "longpo"
    before, stretched, after = (
        _rows(path / "qa" / "samples.jsonl")
        for path in (first / "before", folder / "examined" / f"rope-{first.name}", first / name / name)
    )
    console = Console(width=110)
    columns = ("tokens of the text", "before", "RoPE changed, nothing else", "after LongPO")
    table = Table(*columns, title="Held-out questions answered right, in percent")
    for length in sorted({row["length"] for row in before}):
        scores = [interval(_scores([rows], [length], lambda row: row["score"])) for rows in (before, stretched, after)]
        table.add_row(str(length), *map(_text, scores))
    console.print(table)
    validation = _rows(first / name / "run" / "validation.jsonl")
    if validation:
        table = Table("held-out pairs", "before", "after", title="What LongPO prefers")
        for key in ("rewards/margins", "rewards/accuracies", "nll"):
            table.add_row(key, *(f"{row[key]:.3f}" for row in (validation[0], validation[-1])))
        console.print(table)
    questions = {tuple(q["answers"]): q["question"] for q in _rows(folder / "questions.jsonl")}
    # The first row of each task stays.
    firsts = {row["task"]: row for row in reversed(before) if row["length"] == _length(first.name)}
    asked = sorted(firsts.values(), key=lambda row: row["task"])[:5]
    answers = {row["key"]: row["answer"] for row in after}
    table = Table("question", "right", "before", "after", title=f"Five questions about texts of {first.name} tokens")
    for row in asked:
        right = row["references"]
        table.add_row(questions[tuple(right)], right[-1], row["answer"], answers[row["key"]])
    console.print(table)


def _head(result: Result) -> list[str]:
    return [result.round or "before", result.method, str(result.seeds)]


def _text(value: Interval | None) -> str:
    return "-" if value is None else f"{100 * value.mean:.1f} ({100 * value.low:.0f} to {100 * value.high:.0f})"


def _points(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:+.1f}" for value in values) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}:\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def draw(found: Sequence[Result], path: Path) -> None:
    """Short against long quality, by round and method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [result for result in found if result.short and result.long]
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(shown) + 1.6))
    places = np.arange(len(shown))[::-1]
    for name, color, shift in (("short", "tab:blue", 0.12), ("long", "tab:red", -0.12)):
        values: list[Interval] = [getattr(result, name) for result in shown]
        means = np.array([100 * v.mean for v in values])
        errors = np.array([[100 * (v.mean - v.low), 100 * (v.high - v.mean)] for v in values]).T
        label = f"to {SHORT} tokens" if name == "short" else f"{SHORT} tokens to the round's length"
        axis.errorbar(means, places + shift, xerr=errors, fmt="o", color=color, capsize=3, label=label)
    axis.set_yticks(places, [f"{result.round or 'before'}: {result.method}" for result in shown])
    axis.set(xlim=(-2, 102), xlabel="held-out questions, exact match in percent (95 % interval)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    """Write the tables of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of run.py")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
