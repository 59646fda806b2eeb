"""What became of a run's documents: report.json, and report.html with pictures and samples to read, in one file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.text.documents import DOMAINS


class Histogram:
    """Counts of lengths in bins of powers of the square root of two; its memory does not grow."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self.counts[int(2 * np.log2(max(1, value)))] += 1

    def as_dict(self) -> dict[str, int]:
        """Lower bound of a bin -> count."""
        return {str(round(2 ** (b / 2))): n for b, n in sorted(self.counts.items())}


class Report:
    """Counts through the stages, reasons, lengths, speeds, and samples drawn by seed.

    Args:
        samples: how many to keep for reading.
        seed: of the draw.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.lengths = {name: Histogram() for name in ("documents", "chunks", "chosen", "rejected")}
        self.spent: dict[str, dict[str, float]] = {
            stage: {"prompt_tokens": 0, "new_tokens": 0, "seconds": 0.0} for stage in ("questions", "short", "long")
        }
        self.samples: list[dict[str, Any]] = []
        self._wanted, self._rng, self._seen = samples, np.random.default_rng(seed), 0

    def add(
        self, row: tuple[dict[str, Any], ...], sample: dict[str, Any] | None, skipped: list[dict[str, Any]]
    ) -> None:
        """Count one document with what became of it."""
        document, *stages = row
        self.counts["documents read"] += document["part"] == 0
        self.counts["bytes that are not UTF-8"] += document.get("broken", 0) if document["part"] == 0 else 0
        for row_ in skipped:
            self.reasons[row_["reason"]] += 1
        for name, line in zip(self.spent, stages, strict=True):
            for key in self.spent[name]:
                self.spent[name][key] += line[key]
        if "reason" in document:
            return
        self.counts["documents cut"] += 1
        self.counts["chunks"] += len(document["chunks"])
        self.domains[document["domain"]] += 1
        self.lengths["documents"].add(document["tokens"])
        for chunk in document["chunks"]:
            self.lengths["chunks"].add(chunk[2])
        for key, stage in zip(("questions", "chosen", "rejected"), stages, strict=True):
            good = [t for t in stage["turns"] if "reason" not in t]
            self.counts[f"turns with {key}"] += len(good)
            if key != "questions":
                for turn in good:
                    self.lengths[key].add(turn["new_tokens"])
        if sample is None:
            return
        self.counts["samples"] += 1
        self.counts["turns kept"] += len(sample["turns"])
        self._draw(document, sample)

    def _draw(self, document: dict[str, Any], sample: dict[str, Any]) -> None:
        # Reservoir sampling: each sample is as likely to be shown, however many there are.
        self._seen += 1
        place = len(self.samples) if len(self.samples) < self._wanted else int(self._rng.integers(self._seen))
        if place < self._wanted:
            shown = {**sample, "context": _outline(sample["context"]), "length": len(sample["context"])}
            shown["places"] = [sample["context"].find(t["short_context"]) for t in sample["turns"]]
            shown["name"], shown["tokens"] = document["name"], document["tokens"]
            self.samples[place : place + 1] = [shown]

    def as_dict(self) -> dict[str, Any]:
        rates = {
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
            "engine": rates,
        }

    def write(self, folder: Path, config: str) -> None:
        """Write FOLDER/report.json and report.html."""
        folder.mkdir(parents=True, exist_ok=True)
        content = self.as_dict()
        write_atomically(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
        write_atomically(folder / "report.html", self._html(content, config).encode("utf-8", errors="replace"))

    def _html(self, content: dict[str, Any], config: str) -> str:
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
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8><title>Preference pairs</title>",
            "<meta name=viewport content='width=device-width'>",
            f"<style>{_STYLE}</style><h1>Preference pairs</h1>",
            "<div class=row>",
            _table("Through the stages", ("", "count"), list(content["counts"].items())),
            _table("Kept aside", ("reason", "count"), list(content["reasons"].items()) or [("nothing", 0)]),
            _table("Engine", ("stage", "tokens read", "tokens written", "s", "tokens/s"), engine),
            "</div>",
            f"<img alt='Lengths in tokens' src='data:image/png;base64,{self._picture()}'>",
            f"<h2>{len(self.samples)} samples, drawn at random</h2>",
            *(_sample(s) for s in self.samples),
            f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details></html>",
        ]
        return "\n".join(parts)

    def _picture(self) -> str:
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


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 2em 1em 0}td,th{padding:.15em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.row{display:flex;flex-wrap:wrap;align-items:flex-start}img{max-width:100%}"
    "details{border:1px solid #ddd;border-radius:6px;padding:.5em 1em;margin:.5em 0}summary{cursor:pointer;font-weight:600}"
    ".bar{position:relative;height:12px;background:#e8e8e8;border-radius:3px;margin:.4em 0}"
    ".bar i{position:absolute;top:0;height:12px;background:#e0912f;border-radius:3px;min-width:3px}"
    ".outline{color:#666;font-size:13px;max-height:12em;overflow:auto;border-left:3px solid #ddd;padding-left:.8em}"
    ".outline mark{background:#fbe3c2;color:#222}.two{display:grid;grid-template-columns:1fr 1fr;gap:1.2em}"
    "pre{white-space:pre-wrap;font:13px/1.4 ui-monospace,monospace}"
    ".chunk{max-height:14em;overflow:auto;background:#fdf3e4;padding:.6em}"
)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def cells(row: tuple[Any, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in row) + "</tr>"

    return f"<div><h2>{title}</h2><table>{cells(head, 'th')}{''.join(cells(r, 'td') for r in rows)}</table></div>"


def _outline(text: str) -> list[tuple[int, str]]:
    """Beginnings of at most 40 paragraphs, evenly over a text, with their places."""
    starts = [0] + [i + 2 for i in _places(text, "\n\n")]
    chosen = [starts[round(i * (len(starts) - 1) / 39)] for i in range(40)] if len(starts) > 40 else starts
    return [(s, text[s : s + 90].split("\n")[0]) for s in dict.fromkeys(chosen)]


def _places(text: str, what: str) -> list[int]:
    found, place = [], text.find(what)
    while place >= 0:
        found.append(place)
        place = text.find(what, place + 1)
    return found


def _sample(s: dict[str, Any]) -> str:
    turns = []
    for turn, place in zip(s["turns"], s["places"], strict=True):
        end = place + len(turn["short_context"])
        left, width = 100 * place / max(1, s["length"]), 100 * (end - place) / max(1, s["length"])
        outline = "<br>".join(
            f"<mark>{html.escape(line)}</mark>" if place <= start < end else html.escape(line)
            for start, line in s["context"]
        )
        turns.append(
            f"<p><b>{html.escape(turn['instruction'])}</b></p>"
            f"<div class=bar title='the chunk in its document'><i style='left:{left:.2f}%;width:{width:.2f}%'></i></div>"
            f"<div class=two><div><h4>On the chunk (chosen)</h4><pre>{html.escape(turn['chosen'])}</pre></div>"
            f"<div><h4>On the document (rejected)</h4><pre>{html.escape(turn['rejected'])}</pre></div></div>"
            f"<details><summary>Chunk</summary><pre class=chunk>{html.escape(turn['short_context'])}</pre></details>"
            f"<details><summary>Outline of the document, the chunk marked</summary><div class=outline>{outline}</div></details>"
        )
    return (
        f"<details open><summary>{html.escape(s['name'])}: {s['tokens']:,} tokens, {len(s['turns'])} turn(s)</summary>"
        f"{''.join(turns)}</details>"
    )
