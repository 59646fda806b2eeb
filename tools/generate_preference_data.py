"""A model generates its own short-to-long preference pairs from plain documents.

    python tools/generate_preference_data.py --documents ./texts --model ./model --output pairs.jsonl
    python tools/generate_preference_data.py --config examples/pairs.yaml --documents './books/*.jsonl.zst' ...
    torchrun --nproc-per-node 8 tools/generate_preference_data.py ...           one part a GPU, merged at the end
    sbatch --array 0-15 ... tools/generate_preference_data.py ...               one part a task; then:
    python tools/generate_preference_data.py merge --output pairs.jsonl

Killed at any moment, the same command goes on. --help lists every option, --restart begins again.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_longpo.config import from_command_line
from megatron_longpo.errors import ConfigError
from megatron_longpo.generation.merging import merge
from megatron_longpo.generation.pairs import make_part
from megatron_longpo.generation.settings import GenerationConfig, check
from megatron_longpo.generation.stages import part_folder, read_stage_manifest
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.failure import run_or_fail

PROGRAM = "generate_preference_data.py"


def main() -> None:
    """Generate this part, and merge where that can be done; or merge alone."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "merge":
        merge_command(arguments[1:])
        return
    began = time.time()
    restart = "--restart" in arguments
    if restart:
        arguments.remove("--restart")
    config, print_config = from_command_line(
        arguments, prog=PROGRAM, root=GenerationConfig, description=__doc__.split("\n")[0]
    )
    if print_config:
        print(config.as_yaml(), end="")
        return
    check(config)
    rank, world_size, launcher = part_of(config)
    platform.CURRENT.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    # After the checks: it loads a model.
    from megatron_longpo.engines.make import make_engine

    assert config.run.output is not None
    output = Path(config.run.output)
    try:
        if not output.name or output.is_dir():
            raise IsADirectoryError("it is a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written ({error}); name a file") from None
    if world_size > 1:
        print(f"part {rank} of {world_size} ({launcher})", flush=True)
    make_part(config, make_engine(config.engine, config.documents.seq_length), rank, world_size, restart=restart)
    if launcher == "torchrun" and rank == 0:
        wait_for_others(output, world_size, began if restart else 0.0)
    if world_size == 1 or (launcher == "torchrun" and rank == 0):
        print_summary(output, merge(output))
    elif launcher != "torchrun":
        print(
            f"part {rank} of {world_size} is done; after the last one: python tools/{PROGRAM} merge --output {output}"
        )


def merge_command(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] != "--output":
        raise ConfigError(f"merge takes --output OUTPUT and nothing else, not {' '.join(arguments) or 'nothing'}")
    print_summary(Path(arguments[1]), merge(Path(arguments[1])))


def part_of(config: GenerationConfig) -> tuple[int, int, str]:
    """Which part this process makes, of how many, and who says so."""
    environment = os.environ
    if config.run.rank is not None and config.run.world_size is not None:
        return config.run.rank, config.run.world_size, "--rank"
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun"
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, count = (int(environment[f"SLURM_ARRAY_TASK_{k}"]) for k in ("MIN", "COUNT"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        rank = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        if rank >= count:
            raise ConfigError(
                f"the Slurm array's task {environment['SLURM_ARRAY_TASK_ID']} is none of {count} in a row from {first}; use an "
                "array such as 0-15, and --rank with --world-size to make single parts again"
            )
        return rank, count, "a Slurm array"
    return 0, 1, "alone"


def wait_for_others(output: Path, world_size: int, since: float) -> None:
    """Until all parts are finished; a process that fails makes torchrun end this one.

    ``since``: a manifest from before that moment is of the run that is begun again.
    """
    told = time.monotonic()
    while True:
        missing = []
        for rank in range(world_size):
            manifest = part_folder(output, rank, world_size) / "long.manifest.json"
            if not is_finished(manifest, since):
                missing.append(rank)
        if not missing:
            return
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"waiting for part(s) {', '.join(map(str, missing))}", flush=True)
        time.sleep(0.5)


def is_finished(manifest: Path, since: float) -> bool:
    try:
        return manifest.stat().st_mtime >= since and bool(read_stage_manifest(manifest)["finished"])
    except FileNotFoundError:
        return False


def print_summary(output: Path, report: dict) -> None:  # type: ignore[type-arg]
    counts, reasons = report["counts"], report["reasons"]
    print(
        f"{output}: {counts.get('samples', 0)} samples with {counts.get('turns kept', 0)} turns of "
        f"{counts.get('documents read', 0)} documents; kept aside: "
        + (", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "nothing")
        + f"; {output}.report/report.html"
    )


if __name__ == "__main__":
    run_or_fail(main)
