"""Verification that a checkpoint and a Hugging Face folder are the same model: every tensor bit by bit, then logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_longpo.checkpoint.folders import ASSETS, from_newest_good, resolve
from megatron_longpo.conversion.changes import Changes
from megatron_longpo.conversion.comparison import Comparison, Difference, compare
from megatron_longpo.conversion.logits import BOUND, Agreement, compare_logits
from megatron_longpo.conversion.output import final_name
from megatron_longpo.errors import CheckpointError
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime.collectives import raise_on_all_ranks, rank
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.text.chat import load_tokenizer

_TABLE_WIDTH = 160
_NOT_EQUAL = "convert again, or give verify the changes that the conversion was given, such as --rotary-base"
# Seen with random weights of 12 layers and hidden size 1536: 1.7e-4 from the order of sums alone.
_ONLY_LOGITS = (
    "all tensors and settings are equal, so the two compute differently, or rounding grows in weights that were never trained: "
    "raise --bound for those"
)


@dataclass(frozen=True)
class LogitsCheck:
    """Settings of the comparison of logits.

    Attributes:
        text: text file whose tokens are the input; None: random tokens.
        tokens: number of tokens per row.
        rows: number of rows of random tokens.
        seed: seed of the random tokens.
        first_position: position of each row's first token.
        bound: largest difference allowed between logits, relative to the largest logit.
        whole: keep both models in memory, instead of one layer at a time.
        beyond: also try the rows past every context and sliding window.
    """

    text: str | None = None
    tokens: int = 64
    rows: int = 1
    seed: int = 0
    first_position: int = 0
    bound: float = BOUND
    whole: bool = False
    beyond: bool = True

    def token_rows(self, checkpoint: Path) -> list[list[int]]:
        """Rows of token ids for a checkpoint's vocabulary.

        Raises:
            CheckpointError: the text file cannot be read.
        """
        folder = resolve(checkpoint)
        if self.text is not None:
            try:
                text = Path(self.text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"--text {self.text}: cannot be read ({error}); name a UTF-8 text file") from None
            return [load_tokenizer(folder / ASSETS).encode(text, continues=False)[: self.tokens]]
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = ModelShape.read(folder).vocab_size
        return [torch.randint(0, vocabulary, (self.tokens,), generator=generator).tolist() for _ in range(self.rows)]


def verify(
    checkpoint: Path,
    hf: Path,
    *,
    changes: Changes,
    logits: LogitsCheck | None = None,
    report: Path | None = None,
) -> None:
    """Compare all tensors, then logits; log the result, with a table of the layers that differ.

    Collective: all processes take part, and all raise.

    Args:
        checkpoint: converted checkpoint, run folder or one iteration of a run.
        hf: Hugging Face model folder.
        changes: changes that import or export was given.
        logits: how logits are compared; None: tensors only.
        report: JSON file to write the result to.

    Raises:
        CheckpointError: the two are not the same model.
    """

    def compare_with(folder: Path) -> None:
        _verify(folder, hf, changes=changes, logits=logits, report=report)

    from_newest_good(checkpoint, compare_with)


def _verify(checkpoint: Path, hf: Path, *, changes: Changes, logits: LogitsCheck | None, report: Path | None) -> None:
    first = rank() == 0
    with Progress("verify", unit="bytes", active=first, shared=True, last_line=False) as progress:
        found = compare(checkpoint, hf, changes=changes, progress=progress.add)
    log(
        f"verify: {found.tensors} tensors, {found.bytes / 1e9:.2f} GB compared bit by bit in {progress.seconds:.2f} s: "
        + ("equal" if found.is_equal else f"{len(found.differences)} differ"),
        active=first,
    )
    if first and not found.is_equal:
        print_differences(found)
    agreement = None
    # Models with different tensors are not compared at all, so there is nothing to run side by side.
    if logits is not None and found.tensors:
        agreement = _compare_logits(checkpoint, hf, changes, logits)
    if report is not None:
        # The other ranks must not wait for one that cannot write.
        with raise_on_all_ranks(report):
            if first:
                _write_report(report, found, agreement)
    if not found.is_equal or (agreement is not None and not agreement.is_close):
        raise CheckpointError(
            f"{resolve(checkpoint)} and {final_name(hf)} are not the same model: {'; '.join(_reasons(found, agreement))}; "
            + (_ONLY_LOGITS if found.is_equal else _NOT_EQUAL)
        )


def _compare_logits(checkpoint: Path, hf: Path, changes: Changes, logits: LogitsCheck) -> Agreement:
    first = rank() == 0
    with Progress("layers", unit="layers", active=first, last_line=False) as progress:
        agreement = compare_logits(
            checkpoint,
            hf,
            logits.token_rows(checkpoint),
            changes=changes,
            first_position=logits.first_position,
            bound=logits.bound,
            whole=logits.whole,
            beyond=logits.beyond,
            progress=progress.add,
        )
    log(
        f"verify: logits of {agreement.tokens} tokens differ by at most {agreement.distances[-1]:.1e} relative to the largest "
        f"(bound {agreement.bound:g}); the most likely next token is the same at {agreement.same_choice:.1%} of the "
        f"positions; rows began at {', '.join(map(str, agreement.starts))}"
        + "".join(f"; past the window of {w} layer 0 differs by {d:.1e}" for w, d in agreement.windows.items()),
        active=first,
    )
    if not agreement.is_close:
        log(
            f"verify: the first place where they differ by more than the bound is {agreement.first_beyond}",
            active=first,
        )
    return agreement


def _reasons(found: Comparison, agreement: Agreement | None) -> list[str]:
    reasons = found.settings[:1] + [f"{d.name} differs at {list(d.index)}" for d in found.differences[:1]]
    if agreement is not None and not agreement.is_close:
        reasons.append(
            f"logits differ by {agreement.distances[-1]:.1e} ({agreement.first_beyond} is the first place that does)"
        )
    return reasons


def print_differences(found: Comparison) -> None:
    """Print what differs: settings, then per layer the number of tensors, with the first differing element of the first one."""
    console = Console(width=_TABLE_WIDTH)
    for line in found.settings:
        console.print(f"differs: {line}", soft_wrap=True, highlight=False)
    if not found.differences:
        return
    table = Table("layer", "tensors that differ", "first", "at", "checkpoint", "Hugging Face", "largest difference")
    for layer in (None, *range(found.layers)):
        different = [d for d in found.differences if d.layer == layer]
        table.add_row("outside" if layer is None else str(layer), str(len(different)), *_first_cells(different))
    console.print(table)


def _first_cells(different: Sequence[Difference]) -> list[str]:
    """Cells of the table on the first tensor that differs in a layer, and the largest difference of all."""
    if not different:
        return []
    first, largest = different[0], max(d.largest for d in different)
    return [first.name, str(list(first.index)), f"{first.ours:.6g}", f"{first.theirs:.6g}", f"{largest:.3g}"]


def _write_report(path: Path, found: Comparison, agreement: Agreement | None) -> None:
    content: dict[str, Any] = {
        "tensors": found.tensors,
        "bytes": found.bytes,
        "settings": found.settings,
        "differences": [vars(d) for d in found.differences],
    }
    if agreement is not None:
        content["logits"] = vars(agreement)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
