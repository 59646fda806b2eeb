"""What became of a run's documents: report.json, and report.html with plots and samples to read, in one file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_longpo.generation.stages import DocumentLines, Line
from megatron_longpo.runtime.checked_json import write_checked
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.text.documents import DOMAINS

_TEMPLATE = Path(__file__).with_name("report.html.j2")
# Paragraphs of a document in its outline, and characters of each.
_OUTLINE_PARAGRAPHS = 40
_OUTLINE_CHARACTERS = 90


class Histogram:
    """Counts of lengths in bins that grow by the square root of two; its memory does not grow with the data."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self.counts[int(2 * np.log2(max(1, value)))] += 1

    def as_dict(self) -> dict[str, int]:
        """Lower bound of a bin -> count."""
        return {str(round(2 ** (b / 2))): n for b, n in sorted(self.counts.items())}


@dataclass(frozen=True)
class OutlineLine:
    """Beginning of a paragraph.

    Attributes:
        start: index of the paragraph in its text.
        text: first words.
    """

    start: int
    text: str


@dataclass(frozen=True)
class ShownSample:
    """A sample drawn for reading.

    Attributes:
        name: document.
        tokens: length of the document in tokens.
        characters: length of the document in characters.
        turns: turns of the sample.
        places: index of each turn's chunk in the document.
        outline: outline of the document.
    """

    name: str
    tokens: int
    characters: int
    turns: Sequence[Line]
    places: Sequence[int]
    outline: Sequence[OutlineLine]


class Report:
    """Counts through the stages, reasons, lengths, speeds, and samples drawn at random.

    Args:
        num_samples: how many samples to keep for reading.
        seed: seed of the draw.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.lengths = {name: Histogram() for name in ("documents", "chunks", "chosen", "rejected")}
        self.spent: dict[str, dict[str, float]] = {
            stage: {"prompt_tokens": 0, "new_tokens": 0, "seconds": 0.0} for stage in ("questions", "short", "long")
        }
        self.samples: list[ShownSample] = []
        self._wanted, self._rng, self._seen = num_samples, np.random.default_rng(seed), 0

    def add(self, lines: DocumentLines, sample: Line | None, skipped: Sequence[Line]) -> None:
        """Count one document.

        Args:
            lines: its lines in all stages.
            sample: the sample made of it, if any.
            skipped: what was skipped, with reasons.
        """
        document = lines.document
        self.counts["documents read"] += document["part"] == 0
        self.counts["bytes that are not UTF-8"] += document.get("broken", 0) if document["part"] == 0 else 0
        for line in skipped:
            self.reasons[line["reason"]] += 1
        for name, line in (("questions", lines.questions), ("short", lines.short), ("long", lines.long)):
            for key in self.spent[name]:
                self.spent[name][key] += line[key]
        if "reason" in document:
            return
        self.counts["documents cut"] += 1
        self.counts["chunks"] += len(document["chunks"])
        self.domains[document["domain"]] += 1
        self.lengths["documents"].add(document["tokens"])
        for _, _, tokens in document["chunks"]:
            self.lengths["chunks"].add(tokens)
        self.counts["turns with questions"] += len(_good_turns(lines.questions))
        for side, line in (("chosen", lines.short), ("rejected", lines.long)):
            good = _good_turns(line)
            self.counts[f"turns with {side}"] += len(good)
            for turn in good:
                self.lengths[side].add(turn["new_tokens"])
        if sample is None:
            return
        self.counts["samples"] += 1
        self.counts["turns kept"] += len(sample["turns"])
        self._draw(document, sample)

    def _draw(self, document: Line, sample: Line) -> None:
        # Reservoir sampling: however many samples follow, each is equally likely to be shown.
        self._seen += 1
        place = len(self.samples) if len(self.samples) < self._wanted else int(self._rng.integers(self._seen))
        if place < self._wanted:
            context = sample["context"]
            shown = ShownSample(
                name=document["name"],
                tokens=document["tokens"],
                characters=len(context),
                turns=sample["turns"],
                places=[context.find(turn["short_context"]) for turn in sample["turns"]],
                outline=list(_outline(context)),
            )
            self.samples[place : place + 1] = [shown]

    def as_dict(self) -> dict[str, Any]:
        """Content of report.json."""
        engine = {
            name: {
                **s,
                "tokens_per_second": (s["prompt_tokens"] + s["new_tokens"]) / s["seconds"] if s["seconds"] else 0.0,
            }
            for name, s in self.spent.items()
        }
        return {
            "counts": dict(self.counts),
            "reasons": dict(self.reasons.most_common()),
            "domains": {d: self.domains[d] for d in DOMAINS if self.domains[d]},
            "lengths": {name: h.as_dict() for name, h in self.lengths.items()},
            "engine": engine,
        }

    def write(self, folder: Path, config: str) -> None:
        """Write FOLDER/report.json and FOLDER/report.html.

        Args:
            folder: folder of the report.
            config: the run's configuration, to be shown.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_checked(folder / "report.json", self.as_dict())
        write_atomically(folder / "report.html", self.as_html(config).encode("utf-8", errors="replace"))

    def as_html(self, config: str) -> str:
        """The page, without references to other files. Documents and answers are foreign text: the template escapes them."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        content = self.as_dict()
        engine = [
            (
                name,
                f"{s['prompt_tokens']:,.0f}",
                f"{s['new_tokens']:,.0f}",
                f"{s['seconds']:,.1f}",
                f"{s['tokens_per_second']:,.0f}",
            )
            for name, s in content["engine"].items()
        ]
        return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            counts=list(content["counts"].items()),
            reasons=list(content["reasons"].items()),
            engine=engine,
            picture=self._picture(),
            samples=[_for_template(sample) for sample in self.samples],
            config=config,
        )

    def _picture(self) -> str:
        """Histograms of the lengths: a PNG in base64."""
        # Slow to import, and only needed when a run ends.
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(self.lengths), figsize=(14, 3), constrained_layout=True)
        for axis, (name, histogram) in zip(axes, self.lengths.items(), strict=True):
            bins = sorted(histogram.counts)
            axis.bar(
                [2 ** (b / 2) for b in bins], [histogram.counts[b] for b in bins], [0.4 * 2 ** (b / 2) for b in bins]
            )
            axis.set_xscale("log", base=2)
            axis.set_title(f"{name} (tokens)")
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=90)
        pyplot.close(figure)
        return base64.b64encode(raw.getvalue()).decode()


def _good_turns(line: Line) -> list[Line]:
    return [turn for turn in line["turns"] if "reason" not in turn]


def _for_template(sample: ShownSample) -> dict[str, Any]:
    turns = []
    for turn, place in zip(sample.turns, sample.places, strict=True):
        end = place + len(turn["short_context"])
        percent = 100 / max(1, sample.characters)
        outline = [{"text": line.text, "marked": place <= line.start < end} for line in sample.outline]
        turns.append({**turn, "left": percent * place, "width": percent * (end - place), "outline": outline})
    return {"name": sample.name, "tokens": sample.tokens, "turns": turns}


def _outline(text: str) -> Iterator[OutlineLine]:
    """Beginnings of paragraphs, evenly spread over a text."""
    starts = [0, *(place + 2 for place in _places(text, "\n\n"))]
    if len(starts) > _OUTLINE_PARAGRAPHS:
        step = (len(starts) - 1) / (_OUTLINE_PARAGRAPHS - 1)
        starts = [starts[round(i * step)] for i in range(_OUTLINE_PARAGRAPHS)]
    for start in dict.fromkeys(starts):
        yield OutlineLine(start, text[start : start + _OUTLINE_CHARACTERS].split("\n")[0])


def _places(text: str, what: str) -> Iterator[int]:
    """Where ``what`` is found in a text, overlaps included."""
    place = text.find(what)
    while place >= 0:
        yield place
        place = text.find(what, place + 1)
