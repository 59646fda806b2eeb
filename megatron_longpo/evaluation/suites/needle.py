"""Needle map: does the model find what stands at a given depth of a long text? Lengths by depths, drawn as a heat map.

A haystack of essays holds needles as RULER words them (``niah_multikey`` with one key per depth). With ``shared`` haystacks all
depths of a trial are asked of one text, which an engine reads once. With ``single`` each question has its own haystack with one
needle, as in the classic map, and an engine that keeps prefixes reads again from the needle on.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from typing_extensions import override

from megatron_longpo.engines.base import Engine
from megatron_longpo.errors import DataError
from megatron_longpo.evaluation.materials import Materials, random_number, read_materials, repeated, sentences_of
from megatron_longpo.evaluation.metrics import CellScore, group_by, lengths_of, score_of
from megatron_longpo.evaluation.runner import SampleBatch, SampleGroups
from megatron_longpo.evaluation.samples import AnswerRow, CountPrompt, EvalSample, largest_fit, sample_key
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.evaluation.suites.base import (
    Cell,
    ComparisonLine,
    EngineSuite,
    HeatMap,
    Launch,
    Metrics,
    averages,
    count_prompt,
    percent,
)
from megatron_longpo.evaluation.suites.ruler.definitions import NEEDLE, NIAH_PREFIX_OF_ONE, NIAH_TEMPLATE_OF_ONE
from megatron_longpo.evaluation.suites.ruler.suite import RulerConfig
from megatron_longpo.runtime.tables import Table
from megatron_longpo.schema import Count

# One for all needles of a trial, or one per needle.
Haystack = Literal["shared", "single"]
MAX_TOKENS = 32
# The haystack is fitted with the longest key; questions with other keys may differ by some tokens.
_KEY_MARGIN = 8


@dataclass(frozen=True)
class NeedleConfig:
    """Needle map: depth by length."""

    needle_depths: Count = 11
    """Number of depths, evenly from 0 to 100 %."""
    needle_trials: Count = 5
    """Questions per depth and length."""
    needle_haystack: Haystack = "shared"
    """shared: a haystack holds a needle at every depth, each asked for by its key, and is read once for all; single: one needle
    per haystack, the classic map."""


class NeedleRow(AnswerRow):
    """An answer with the depth of its needle in percent."""

    depth: float


class NeedleSuite(EngineSuite[Materials]):
    """Needle map."""

    name = "needle"
    title = "Needle map: found, by depth and length"
    settings_alike = ("version", "depths", "haystacks")
    settings_by_task = ("materials",)

    @override
    def prepare(self, launch: Launch) -> Materials:
        options = launch.config.section(RulerConfig)
        materials = read_materials(options.haystack, options.words, limits=launch.config.reading)
        _ = materials.essay_words
        materials.check_words()
        return materials

    @override
    def settings(self, config: SuiteConfig, inputs: Materials) -> dict[str, Any]:
        options = config.section(NeedleConfig)
        return {
            "materials": {"haystack": inputs.digests()["haystack"]},
            "depths": options.needle_depths,
            "haystacks": options.needle_haystack,
        }

    @override
    def batches(self, launch: Launch, inputs: Materials, engine: Engine) -> list[SampleBatch[SampleGroups]]:
        """One batch per trial and length."""
        config, options = launch.config, launch.config.section(NeedleConfig)
        needles = NeedleMap(
            inputs,
            partial(count_prompt, engine),
            seed=config.evaluate.seed,
            depths=options.needle_depths,
            kind=options.needle_haystack,
        )
        # Fail now if the shortest length is too short.
        needles.trial(config.lengths[0], 0)
        return [
            SampleBatch(
                keys=tuple(sample_key(self.name, task_of(depth), length, trial) for depth in needles.depths),
                cost=float(length * (1 if options.needle_haystack == "shared" else len(needles.depths))),
                make=partial(needles.trial, length, trial),
            )
            for length in config.lengths
            for trial in range(options.needle_trials)
        ]

    @override
    def metrics(self, rows: Sequence[AnswerRow]) -> Metrics:
        """Per depth and length, and the mean over all."""
        ordered = sorted(cast("Sequence[NeedleRow]", rows), key=lambda row: (row["depth"], row["length"]))
        depths = group_by(ordered, lambda row: f"{cast(NeedleRow, row)['depth']:g}")
        cells = {
            depth: {str(n): score_of(cell) for n, cell in group_by(group, lambda row: row["length"]).items()}
            for depth, group in depths.items()
        }
        return {"depths": cells, "average": score_of(rows)}

    @override
    def tables(self, metrics: Metrics) -> list[Table]:
        lengths = lengths_of(metrics["depths"])
        rows = [
            [f"{depth} %", *(percent(cells[n]["score"] if n in cells else None) for n in lengths)]
            for depth, cells in metrics["depths"].items()
        ]
        return [Table(self.title, ["depth", *lengths], rows)]

    @override
    def heat_map(self, metrics: Metrics) -> HeatMap:
        return HeatMap(
            title=f"Needle in a haystack: {percent(metrics['average']['score'])} % found",
            label="depth of the needle",
            columns=lengths_of(metrics["depths"]),
            rows={f"{d} %": {n: cell["score"] for n, cell in cells.items()} for d, cells in metrics["depths"].items()},
        )

    @override
    def cells(self, metrics: Metrics) -> Mapping[Cell, CellScore]:
        return {Cell(f"{d} %", n): cell for d, cells in metrics["depths"].items() for n, cell in cells.items()}

    @override
    def comparison_lines(self, cells: Sequence[Cell]) -> list[ComparisonLine]:
        """Averages only: a line per depth and length would say little."""
        return averages(cells)


def depths_of(count: int) -> list[float]:
    """Depths in percent, evenly from 0 to 100."""
    return [round(100 * i / (count - 1), 1) for i in range(count)] if count > 1 else [50.0]


def task_of(depth: float) -> str:
    """Name of the task of a depth."""
    return f"depth {depth:g}"


@dataclass(frozen=True)
class _Needle:
    """A needle.

    Attributes:
        number: index of its depth.
        depth: where it stands, in percent of the text.
        key, value: what it says.
    """

    number: int
    depth: float
    key: str
    value: str


class NeedleMap:
    """Makes the questions of a trial.

    Args:
        materials: essays and words.
        count: counts the tokens of a prompt.
        seed: seed of all samples.
        depths: number of depths.
        kind: one haystack for all needles of a trial, or one per needle.
    """

    def __init__(self, materials: Materials, count: CountPrompt, *, seed: int, depths: int, kind: Haystack) -> None:
        self.materials, self.count, self.seed, self.kind = materials, count, seed, kind
        self.depths = depths_of(depths)

    def trial(self, length: int, trial: int) -> SampleGroups:
        """The questions of a trial at all depths; the samples of a group share their haystack.

        Args:
            length: tokens of prompt and answer together.
            trial: number of the trial.

        Raises:
            DataError: the length has no room for the needles.
        """
        rng = random.Random(f"{self.seed}/needle/{length}/{trial}")
        # A dict as an ordered set.
        keys: dict[str, None] = {}
        while len(keys) < len(self.depths):
            keys[self.materials.word_key(rng)] = None
        needles = [
            _Needle(number, depth, key, random_number(rng))
            for number, (key, depth) in enumerate(zip(keys, self.depths, strict=True))
        ]
        # Each trial's haystack begins at another word of the essays.
        offset = rng.randrange(len(self.materials.essay_words))
        groups = [needles] if self.kind == "shared" else [[needle] for needle in needles]
        return [self._ask(length, trial, group, offset) for group in groups]

    def _ask(self, length: int, trial: int, needles: Sequence[_Needle], offset: int) -> list[EvalSample]:
        """One haystack with these needles, and a question for each."""
        words = self.materials.essay_words
        rotated = words[offset:] + words[:offset]
        longest_key = max((needle.key for needle in needles), key=lambda key: self.count(key, ""))
        try:
            context = largest_fit(
                lambda count: _haystack(repeated(rotated, count), needles),
                lambda context: self.count(*_prompt(context, longest_key)),
                length - MAX_TOKENS - _KEY_MARGIN,
                # Words, of about 4/3 tokens.
                start=length * 3 // 4,
            ).built
        except DataError as error:
            raise DataError(f"needle at {length} tokens: {error}; ask for longer samples or fewer depths") from None
        samples = []
        for needle in needles:
            message, prefix = _prompt(context, needle.key)
            samples.append(
                EvalSample(
                    suite="needle",
                    task=task_of(needle.depth),
                    length=length,
                    index=trial,
                    message=message,
                    prefix=prefix,
                    references=(needle.value,),
                    scorer="string_match_all",
                    max_tokens=MAX_TOKENS,
                    prompt_tokens=self.count(message, prefix),
                    details={"depth": needle.depth, "number": needle.number},
                )
            )
        return samples


def _haystack(text: str, needles: Sequence[_Needle]) -> str:
    """A text with needles between its sentences, each at the end of a sentence that is nearest to its depth."""
    sentences = sentences_of(text)
    # In characters: sentences are of unequal length.
    ends = list(itertools.accumulate((len(s) + 1 for s in sentences), initial=0))
    parts: list[str] = []
    last = 0
    for needle in needles:
        target = ends[-1] * needle.depth / 100
        after = bisect.bisect_left(ends, target)
        place = min((i for i in (after - 1, after) if i >= 0), key=lambda i: abs(ends[i] - target))
        parts += [*sentences[last:place], NEEDLE.format(kind="numbers", key=needle.key, value=needle.value)]
        last = place
    return " ".join([*parts, *sentences[last:]])


def _prompt(context: str, key: str) -> tuple[str, str]:
    """Message and prefix."""
    message = NIAH_TEMPLATE_OF_ONE.format(kind="number", context=context, query=key)
    return message, NIAH_PREFIX_OF_ONE.format(kind="number", query=key)
