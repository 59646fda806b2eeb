"""One part of a generation, and the merged output where this process can write it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_longpo.engines.make import make_engine
from megatron_longpo.engines.positions import declared_positions
from megatron_longpo.errors import ConfigError
from megatron_longpo.generation.merging import merge
from megatron_longpo.generation.pairs import make_part
from megatron_longpo.generation.settings import GenerationConfig
from megatron_longpo.generation.stages import part_folder, read_stage_manifest
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.share import Share

_POLL_SECONDS = 0.5
_SECONDS_PER_LINE = 60.0


def generate(config: GenerationConfig, share: Share, *, restart: bool = False) -> dict[str, Any] | None:
    """Generate one part; then merge all parts if there is only this one, or, on torchrun's first rank, when all are done.

    Args:
        config: a configuration that passed its checks.
        share: the part that this process generates.
        restart: discard what an earlier run has made.

    Returns:
        The report of the merged output, as ``merge`` gives it; None if the parts are still to be merged.

    Raises:
        ConfigError: the output cannot be written.
        LongPOError: whatever ``make_part`` and ``merge`` raise.
    """
    began = time.time()
    assert config.run.output is not None
    output = Path(config.run.output)
    check_output(output)
    if share.world_size > 1:
        log(f"part {share.rank} of {share.world_size} ({share.launcher})")
    engine = make_engine(config.engine, config.documents.seq_length)
    if share.rank == 0:
        warn_of_positions(config)
    make_part(config, engine, share.rank, share.world_size, restart=restart)
    if share.world_size > 1:
        if not share.together or share.rank:
            return None
        _wait_for_parts(output, share.world_size, since=began if restart else 0.0)
    return merge(output)


def check_output(output: Path) -> None:
    """Check that everything can be written that is written in the end, hours later.

    Args:
        output: the merged file.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if not output.name or output.is_dir():
            raise IsADirectoryError("it is a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written ({error.strerror or error}); name a file") from None
    report, skipped = output.with_name(output.name + ".report"), output.with_name(output.name + ".rejects.jsonl")
    if report.exists() and not report.is_dir():
        raise ConfigError(
            f"{report}: is a file, and the report's folder belongs there; move it away, or name another --output"
        )
    if skipped.is_dir():
        raise ConfigError(f"{skipped}: is a folder, and a file belongs there; move it away, or name another --output")


def warn_of_positions(config: GenerationConfig) -> None:
    """Log if prompts with their answers exceed the positions that the model's config.json declares."""
    assert config.engine.model is not None
    positions, answers = declared_positions(config.engine.model), config.answers
    if positions is None or answers.rotary_base is not None or answers.rope_type is not None:
        return
    longest = config.document_tokens[1] + config.long_sampling[0] + config.engine.thinking_tokens
    if longest > positions:
        log(
            f"note: the model declares {positions} positions, and documents with their answers have up to {longest} tokens; "
            "lower seq_length, or raise the model's range with rotary_base or rope_type"
        )


def _wait_for_parts(output: Path, world_size: int, *, since: float) -> None:
    """Block until all parts are finished. If another process fails, torchrun ends this one.

    Args:
        output: the merged file.
        world_size: number of parts.
        since: time before which a manifest belongs to the run that was restarted.
    """
    logged = time.monotonic()
    while True:
        missing = []
        for rank in range(world_size):
            manifest = part_folder(output, rank, world_size) / "long.manifest.json"
            if not _is_finished(manifest, since):
                missing.append(rank)
        if not missing:
            return
        if time.monotonic() - logged > _SECONDS_PER_LINE:
            logged = time.monotonic()
            log(f"waiting for part(s) {', '.join(map(str, missing))}")
        time.sleep(_POLL_SECONDS)


def _is_finished(manifest: Path, since: float) -> bool:
    try:
        return manifest.stat().st_mtime >= since and bool(read_stage_manifest(manifest)["finished"])
    except FileNotFoundError:
        return False
