"""One part of a generation, and the merged output where this process can write it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_longpo.engines.make import make_engine
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
    try:
        if not output.name or output.is_dir():
            raise IsADirectoryError("it is a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written ({error}); name a file") from None
    if share.world_size > 1:
        log(f"part {share.rank} of {share.world_size} ({share.launcher})")
    engine = make_engine(config.engine, config.documents.seq_length)
    make_part(config, engine, share.rank, share.world_size, restart=restart)
    if share.world_size > 1:
        if not share.together or share.rank:
            return None
        _wait_for_parts(output, share.world_size, since=began if restart else 0.0)
    return merge(output)


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
