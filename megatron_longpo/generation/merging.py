"""The parts of a run into one file: filters, skipped rows, report."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_longpo.config import from_yaml
from megatron_longpo.errors import DataError
from megatron_longpo.generation.filters import LanguageFilter, why_not_keep
from megatron_longpo.generation.pairs import chunk_text
from megatron_longpo.generation.report import Report
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import (
    STAGES,
    Line,
    Stage,
    brief,
    part_folder,
    part_folders,
    read_lines,
    read_stage_manifest,
    work_folder,
)
from megatron_longpo.runtime.files import FolderLock


def parts_of(output: Path) -> list[Path]:
    """Folders of all parts.

    Raises:
        DataError: none, or some are not there or not finished.
    """
    found = part_folders(output)
    if not found:
        raise DataError(f"{work_folder(output)}: holds no part of a run; generate pairs with --output {output} first")
    world = int(found[0].name.split("-of-")[1])
    missing = []
    for rank in range(world):
        manifest = part_folder(output, rank, world) / "long.manifest.json"
        if not manifest.exists() or not read_stage_manifest(manifest)["finished"]:
            missing.append(rank)
    if missing:
        raise DataError(
            f"{work_folder(output)}: part(s) {', '.join(map(str, missing))} of {world} are not finished; run them with "
            "--rank and --world-size, then merge"
        )
    identities = [
        read_stage_manifest(part_folder(output, r, world) / "long.manifest.json")["identity"] for r in range(world)
    ]
    for rank, identity in enumerate(identities):
        for key in sorted({*identity, *identities[0]}):
            if identity.get(key) != identities[0].get(key):
                raise DataError(
                    f"{work_folder(output)}: part {rank} was made with {key}={brief(identity.get(key))}, part 0 with "
                    f"{brief(identities[0].get(key))}; make them again with one configuration"
                )
    return [part_folder(output, r, world) for r in range(world)]


def all_rows(output: Path) -> Iterator[tuple[Line, Line, Line, Line]]:
    """Lines of all stages of all parts together, in the order of the documents."""

    def rows(folder: Path) -> Iterator[tuple[tuple[int, int], tuple[Line, ...]]]:
        for name in STAGES:
            manifest = read_stage_manifest(folder / f"{name}.manifest.json")
            Stage(folder, name, manifest["identity"])  # raises where lines are missing
        for row in zip(*(read_lines(folder / f"{name}.jsonl") for name in STAGES), strict=True):
            yield (row[0]["number"], row[0]["part"]), row

    for _, row in heapq.merge(*(rows(folder) for folder in parts_of(output)), key=lambda x: x[0]):
        yield row  # type: ignore[misc]


def judge(
    config: GenerationConfig, language: LanguageFilter, row: tuple[Line, Line, Line, Line]
) -> tuple[Line | None, list[Line]]:
    """A document's sample, if anything of it is kept, and what was skipped with reasons."""
    document, questions, short, long = row
    base = {"number": document["number"], "part": document["part"], "name": document["name"]}
    if "reason" in document:
        detail = {"tokens": document["tokens"]} if "tokens" in document else {}
        return None, [{**base, "reason": document["reason"], **detail}]
    turns, skipped = [], []
    for i, (asked, chosen, rejected) in enumerate(zip(questions["turns"], short["turns"], long["turns"], strict=True)):
        found = next((t for t in (asked, chosen, rejected) if t.get("reason", "before") != "before"), None)
        reason, detail_text = (found["reason"], found.get("detail", "")) if found else (None, "")
        if reason is None:
            reason = why_not_keep(chosen["text"], rejected["text"], config.filters)
            detail_text = f"{chosen['text'][:150]} | {rejected['text'][:150]}"
        if reason is None and not language.passes(asked["question"], chosen["text"], rejected["text"]):
            reason, detail_text = "language", asked["question"][:300]
        if reason is not None:
            skipped.append({**base, "id": document["id"], "turn": i, "reason": reason, "detail": detail_text})
            continue
        turns.append(
            {
                "instruction": asked["instruction"],
                "short_context": chunk_text(document, i),
                "chosen": chosen["text"],
                "rejected": rejected["text"],
            }
        )
    if not turns:
        return None, [*skipped, {**base, "id": document["id"], "reason": "no_turn_left"}]
    return {"id": f"{document['name']}-{document['id'][:12]}", "context": document["text"], "turns": turns}, skipped


def merge(output: Path) -> dict[str, Any]:
    """Merge all parts of a run: OUTPUT, OUTPUT.rejects.jsonl and OUTPUT.report, each whole or not there.

    Returns:
        What report.json says.

    Raises:
        DataError: parts that are not there, not finished, or not of one run.
    """
    parts_of(output)
    with FolderLock(work_folder(output), name=output):
        return _merge(output)


def _merge(output: Path) -> dict[str, Any]:
    config = from_yaml(work_folder(output) / "run.yaml", GenerationConfig)
    language = LanguageFilter(config.filters.languages, config.filters.min_language_probability)
    report = Report(config.run.report_samples, config.run.seed)
    skipped_path = output.with_name(output.name + ".rejects.jsonl")
    writing = [p.with_name(f".{p.name}.writing") for p in (output, skipped_path)]
    with (
        open(writing[0], "w", encoding="utf-8", errors="replace") as good,
        open(writing[1], "w", encoding="utf-8", errors="replace") as bad,
    ):
        for row in all_rows(output):
            sample, skipped = judge(config, language, row)
            report.add(row, sample, skipped)
            if sample is not None:
                good.write(json.dumps(sample, ensure_ascii=False) + "\n")
            for row_ in skipped:
                bad.write(json.dumps(row_, ensure_ascii=False) + "\n")
        for stream in (good, bad):
            stream.flush()
            os.fsync(stream.fileno())
    report.write(output.with_name(output.name + ".report"), config.as_yaml())
    os.replace(writing[1], skipped_path)
    os.replace(writing[0], output)
    return report.as_dict()
