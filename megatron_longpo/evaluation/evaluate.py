"""One evaluation, from a checked configuration to the report."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.engines.make import make_engine
from megatron_longpo.engines.positions import declared_positions
from megatron_longpo.errors import ConfigError, LongPOError
from megatron_longpo.evaluation.metrics import in_words, missing_answers
from megatron_longpo.evaluation.registry import SUITES
from megatron_longpo.evaluation.report import REPORT_FILES, print_result, remove_from_report, write_report
from megatron_longpo.evaluation.results import read_or_begin
from megatron_longpo.evaluation.sections import SuiteConfig
from megatron_longpo.evaluation.suites.base import EngineSuite, Launch, ReadySuite, Suite
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.share import Share, share_of_process


def evaluate(config: SuiteConfig, *, restart: bool = False) -> None:
    """Run the selected suites one after the other; the report is rewritten after each.

    Everything that can fail early does: no suite runs before all files are read, samples of all suites can be made, and all
    folders are open.

    Args:
        config: configuration that passed ``settings.check``.
        restart: discard the answers of earlier runs.

    Raises:
        LongPOError: the first thing that is wrong.
    """
    share = share_of_process(config.evaluate.rank, config.evaluate.world_size)
    platform.CURRENT.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    make_folder(config.output)
    if restart and share.world_size > 1:
        raise ConfigError(
            f"--restart with {share.world_size} processes is not possible; remove {config.output} and launch without it"
        )
    suites = order_of_run(config.suites)
    launch = Launch(config, share, restart)
    inputs = {suite.name: suite.prepare(launch) for suite in suites}
    if restart:
        remove_from_report(config.output, config.suites)
    ready = begin_all(launch, suites, inputs)
    del inputs
    reported = False
    unanswered: dict[str, Counter[str]] = {}
    while ready:
        # Removed from the list before it runs: it may hold a model, and the next one may load another.
        suite, next_ready = suites.pop(0), ready.pop(0)
        result = next_ready.run()
        del next_ready
        if not (suites and suites[0].uses_engine):
            platform.CURRENT.free_memory()
        if result is not None:
            write_report(config.output, suite.name, result)
            print_result(suite.name, result)
            reported = True
            cells = suite.cells(result.metrics).values()
            missing = missing_answers(cells)
            if missing and missing.total() == sum(cell["samples"] for cell in cells):
                unanswered[suite.name] = missing
    if reported:
        log(f"{config.output}: report.md, results.json")
    for name, missing in unanswered.items():
        raise NoAnswers(
            f"{name}: no sample has an answer ({in_words(missing)}); {FIXES[max(missing, key=missing.__getitem__)]}"
        )


class NoAnswers(LongPOError):
    """A suite has been evaluated, and not one of its samples has an answer."""


# What to do about samples without an answer, by reason.
FIXES = {
    "refused": "see refused in samples.jsonl, and lower lengths or change the engine",
    "declined": "check the server's filters and the model",
    "empty": "check that the model and its chat template belong together",
    "only_thinking": "raise thinking_tokens, or turn thinking off with --chat-template-kwargs",
    "not_finite": "evaluate in another dtype",
}


def order_of_run(names: list[str]) -> list[Suite[Any]]:
    """Suites in the order in which they run: those of the engine as the user names them, then the others as registered.

    The others load models of their own, so the engine must be gone by then.
    """
    by_engine = [SUITES[name] for name in names if SUITES[name].uses_engine]
    return by_engine + [suite for name, suite in SUITES.items() if name in names and not suite.uses_engine]


def begin_all(launch: Launch, suites: Sequence[Suite[Any]], inputs: Mapping[str, Any]) -> list[ReadySuite]:
    """Make all suites ready; those that use the engine share it, and nothing else holds it.

    Args:
        launch: configuration and share of this process.
        suites: the suites.
        inputs: what they prepared, by name.
    """
    engine, config = None, launch.config
    lengths = sorted({length for suite in suites if isinstance(suite, EngineSuite) for length in suite.lengths(config)})
    if lengths:
        engine = make_engine(config.engine, lengths[-1], keep_prefix=True)
        warn_of_positions(config, lengths, launch.share)
    return [suite.begin(launch, inputs[suite.name], engine) for suite in suites]


def make_folder(output: Path) -> None:
    """Create the output folder, and check that the report can be written into it: that comes after hours of work.

    Raises:
        ConfigError: it cannot be created or written, or holds something else where the report belongs.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"output={output}: cannot be written ({error.strerror or error}); name a folder that can be"
        ) from None
    for name in REPORT_FILES:
        if (output / name).is_dir():
            raise ConfigError(
                f"{output / name}: is a folder, and a file belongs there; move it away, or name another --output"
            )
    # Raises if it is damaged, or of another format.
    read_or_begin(output)


def warn_of_positions(config: SuiteConfig, lengths: Sequence[int], share: Share) -> None:
    """Log which of the lengths exceed the positions that the model's config.json declares; they are measured all the same."""
    positions, thinking = declared_positions(config.model), config.engine.thinking_tokens
    if positions is None:
        return
    beyond = [length for length in lengths if length + thinking > positions]
    if beyond:
        with_thinking = f" with {thinking} tokens of thinking" if thinking else ""
        log(
            f"note: the model declares {positions} positions; lengths {', '.join(map(str, beyond))}{with_thinking} exceed them",
            active=share.rank == 0,
        )
