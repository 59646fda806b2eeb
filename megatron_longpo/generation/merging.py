"""Merges the parts of a run: filters, skipped rows, report."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_longpo.errors import DataError
from megatron_longpo.generation.filters import LanguageFilter, why_not_keep
from megatron_longpo.generation.pairs import DETAIL_CHARACTERS, chunk_text
from megatron_longpo.generation.report import Report
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import (
    STAGES,
    DocumentLines,
    Line,
    Stage,
    brief,
    joined,
    part_folder,
    part_folders,
    read_config,
    read_stage_manifest,
    work_folder,
)
from megatron_longpo.runtime.files import FolderLock, sha256_of, write_checksum

# Digits of a document's id in a sample's id.
_ID_DIGITS = 12


def parts_of(output: Path) -> list[Path]:
    """Folders of all parts of a run.

    Raises:
        DataError: there are none, or some are missing, unfinished, or made with different settings.
    """
    found = part_folders(output)
    if not found:
        raise DataError(f"{work_folder(output)}: holds no part of a run; generate pairs with --output {output} first")
    world_size = int(found[0].name.split("-of-")[1])
    folders = [part_folder(output, rank, world_size) for rank in range(world_size)]
    manifests = [_long_manifest(folder) for folder in folders]
    missing = [rank for rank, manifest in enumerate(manifests) if manifest is None or not manifest["finished"]]
    if missing:
        raise DataError(
            f"{work_folder(output)}: part(s) {', '.join(map(str, missing))} of {world_size} are not finished; run them with "
            "--rank and --world-size, then merge"
        )
    identities = [manifest["identity"] for manifest in manifests if manifest is not None]
    for rank, identity in enumerate(identities):
        for key in sorted({*identity, *identities[0]}):
            if identity.get(key) != identities[0].get(key):
                raise DataError(
                    f"{work_folder(output)}: part {rank} was made with {key}={brief(identity.get(key))}, part 0 with "
                    f"{brief(identities[0].get(key))}; make all parts again with one configuration"
                )
    return folders


def _long_manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of a part's last stage, or None if there is none yet."""
    path = folder / "long.manifest.json"
    return read_stage_manifest(path) if path.exists() else None


def all_lines(output: Path) -> Iterator[DocumentLines]:
    """Lines of all documents of all parts, in the order of the documents.

    Raises:
        DataError: see ``parts_of``; or lines are missing or damaged.
    """

    def lines_of(folder: Path) -> Iterator[DocumentLines]:
        for name in STAGES:
            manifest = read_stage_manifest(folder / f"{name}.manifest.json")
            # Raises where lines are missing.
            Stage(folder, name, manifest["identity"])
        for lines in joined([folder / f"{name}.jsonl" for name in STAGES]):
            yield DocumentLines(*lines)

    parts = [lines_of(folder) for folder in parts_of(output)]
    yield from heapq.merge(*parts, key=lambda lines: (lines.document["number"], lines.document["part"]))


def judge(config: GenerationConfig, language: LanguageFilter, lines: DocumentLines) -> tuple[Line | None, list[Line]]:
    """The sample of a document, if any turn is kept, and what was skipped, with reasons."""
    document = lines.document
    base = {"number": document["number"], "part": document["part"], "name": document["name"]}
    if "reason" in document:
        tokens = {"tokens": document["tokens"]} if "tokens" in document else {}
        return None, [{**base, "reason": document["reason"], **tokens}]
    turns: list[Line] = []
    skipped: list[Line] = []
    of_stages = zip(lines.questions["turns"], lines.short["turns"], lines.long["turns"], strict=True)
    for i, (asked, chosen, rejected) in enumerate(of_stages):
        reason, detail = _why_not(config, language, asked, chosen, rejected)
        if reason is not None:
            skipped.append({**base, "id": document["id"], "turn": i, "reason": reason, "detail": detail})
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
    name = f"{document['name']}-{document['id'][:_ID_DIGITS]}"
    return {"id": name, "context": document["text"], "turns": turns}, skipped


def _why_not(
    config: GenerationConfig, language: LanguageFilter, asked: Line, chosen: Line, rejected: Line
) -> tuple[str | None, str]:
    """Why a turn is skipped, with a detail for people; None if it is kept."""
    for turn in (asked, chosen, rejected):
        # "before" says only that an earlier stage has the reason.
        if turn.get("reason", "before") != "before":
            return turn["reason"], turn.get("detail", "")
    reason = why_not_keep(chosen["text"], rejected["text"], config.filters)
    if reason is not None:
        half = DETAIL_CHARACTERS // 2
        return reason, f"{chosen['text'][:half]} | {rejected['text'][:half]}"
    if not language.passes(asked["question"], chosen["text"], rejected["text"]):
        return "language", asked["question"][:DETAIL_CHARACTERS]
    return None, ""


def merge(output: Path) -> dict[str, Any]:
    """Merge all parts of a run into OUTPUT, OUTPUT.rejects.jsonl and OUTPUT.report; each file appears whole or not at all.

    Returns:
        Content of report.json.

    Raises:
        DataError: see ``parts_of``; or another process works on the run.
    """
    parts_of(output)
    with FolderLock(work_folder(output), name=output, record=True):
        return _merge(output)


def _merge(output: Path) -> dict[str, Any]:
    config = read_config(output)
    language = LanguageFilter(config.filters.languages, config.filters.min_language_probability)
    report = Report(config.run.report_samples, config.run.seed)
    skipped_path = output.with_name(output.name + ".rejects.jsonl")
    writing, writing_skipped = (p.with_name(f".{p.name}.writing") for p in (output, skipped_path))
    with (
        open(writing, "w", encoding="utf-8", errors="replace") as kept_stream,
        open(writing_skipped, "w", encoding="utf-8", errors="replace") as skipped_stream,
    ):
        for lines in all_lines(output):
            sample, skipped = judge(config, language, lines)
            report.add(lines, sample, skipped)
            if sample is not None:
                kept_stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
            for line in skipped:
                skipped_stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        for stream in (kept_stream, skipped_stream):
            stream.flush()
            os.fsync(stream.fileno())
    report.write(output.with_name(output.name + ".report"), config.as_yaml())
    # The pairs come last: once they exist, everything else does.
    os.replace(writing_skipped, skipped_path)
    write_checksum(output, sha256_of(writing))
    os.replace(writing, output)
    return report.as_dict()
