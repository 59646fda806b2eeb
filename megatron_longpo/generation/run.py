"""One part of a generation, and the merged output where this process can write it."""

from __future__ import annotations

import datetime
import os
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
_STORE_PATIENCE = datetime.timedelta(hours=6)


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
    assert config.run.output is not None
    output = Path(config.run.output)
    check_output(output)
    if share.world_size > 1:
        log(f"part {share.rank} of {share.world_size} ({share.launcher})")
    engine = make_engine(config.engine, config.documents.seq_length)
    if share.rank == 0:
        warn_of_positions(config)
    restarted = Restarted(share) if restart and share.together and share.world_size > 1 else None
    make_part(
        config,
        engine,
        share.rank,
        share.world_size,
        restart=restart,
        on_discarded=(lambda: None) if restarted is None else restarted.add,
    )
    if share.world_size > 1:
        if not share.together or share.rank:
            return None
        _wait_for_parts(output, share.world_size, restarted)
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


class Restarted:
    """Counts the processes of a launch that have discarded what an earlier run made of their part.

    Until all have, a finished part may be the earlier run's. They count in the launcher's store: times of files depend on the
    clocks of nodes and file servers, which differ and may jump.

    Args:
        share: this process's share.
    """

    def __init__(self, share: Share) -> None:
        import torch.distributed as dist

        self._count = share.world_size
        # torchrun's own store, or one of rank 0's; processes load models of their own before they get here.
        has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=share.rank == 0 and not has_store,
            timeout=_STORE_PATIENCE,
            wait_for_workers=False,
        )
        self._key = f"megatron_longpo/restarted/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def add(self) -> None:
        """Count this process."""
        self._store.add(self._key, 1)

    @property
    def all_have(self) -> bool:
        """Whether all processes have discarded their part."""
        return int(self._store.add(self._key, 0)) >= self._count


def _wait_for_parts(output: Path, world_size: int, restarted: Restarted | None) -> None:
    """Block until all parts are finished. If another process fails, torchrun ends this one.

    Args:
        output: the merged file.
        world_size: number of parts.
        restarted: counts the processes that have begun afresh; None: none of them does.
    """
    logged = time.monotonic()
    while True:
        # Asked first: a part that is finished after all have begun is of this run.
        have_begun = restarted is None or restarted.all_have
        missing = []
        for rank in range(world_size):
            manifest = part_folder(output, rank, world_size) / "long.manifest.json"
            if not _is_finished(manifest):
                missing.append(rank)
        if have_begun and not missing:
            return
        if time.monotonic() - logged > _SECONDS_PER_LINE:
            logged = time.monotonic()
            log(f"waiting for part(s) {', '.join(map(str, missing)) or 'to begin afresh'}")
        time.sleep(_POLL_SECONDS)


def _is_finished(manifest: Path) -> bool:
    try:
        return bool(read_stage_manifest(manifest)["finished"])
    except FileNotFoundError:
        return False
