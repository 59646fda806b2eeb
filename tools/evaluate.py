"""Evaluate a Hugging Face checkpoint, or a server with OpenAI's interface; compare evaluations.

    python tools/evaluate.py --model ./model --tasks ruler,needle --lengths 4096,8192 --haystack ./essays --output ./eval
    torchrun --nproc-per-node 8 tools/evaluate.py ...                           samples shared by the processes
    python tools/evaluate.py --compare ./before ./after --output ./comparison   table with confidence intervals, plots

Killed at any moment, the same command goes on. --help lists every option, --restart begins again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.config import from_command_line
from megatron_longpo.data.indexed import read_manifest
from megatron_longpo.errors import ConfigError
from megatron_longpo.evaluation.runner import Results, Share
from megatron_longpo.evaluation.settings import EvaluationConfig, check
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.failure import run_or_fail

PROGRAM = "evaluate.py"


def main() -> None:
    """Evaluate, or compare."""
    arguments = sys.argv[1:]
    if "--compare" in arguments:
        compare_command(arguments)
        return
    restart = "--restart" in arguments
    if restart:
        arguments.remove("--restart")
    config, print_config = from_command_line(
        arguments,
        prog=PROGRAM,
        root=EvaluationConfig,
        description=__doc__.split("\n")[0] + " Also: --compare DIR DIR ... [--output DIR], --restart.",
        quiet=os.environ.get("RANK", "0") != "0",
    )
    if print_config:
        print(config.as_yaml(), end="")
        return
    check(config)
    share = share_of(config)
    platform.CURRENT.use_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
    evaluate(config, share, restart=restart)


def evaluate(config: EvaluationConfig, share: Share, *, restart: bool) -> None:
    """Make all suites ready, then run one after the other; the report is written anew after each."""
    from megatron_longpo.evaluation.report import forget, show, write_report
    from megatron_longpo.evaluation.suites import METRICS, Suites, begin_short, prepare

    assert config.evaluate.output is not None and config.engine.model is not None
    output = Path(config.evaluate.output)
    make_folder(output)
    if restart and share.world_size > 1:
        raise ConfigError(f"--restart is for one process; remove {output}, then launch again without it")
    if "preference" in config.suites:
        check_preferences(config, share)
    prepared = prepare(config)
    suites = [s for s in config.suites if s in METRICS]
    if restart:
        forget(output, config.suites)
    reported = False

    def finish(suite: str, result: dict[str, Any] | None) -> None:
        nonlocal reported
        if result is not None:
            write_report(output, {suite: result})
            show(suite, result["metrics"])
            reported = True

    begun = []
    if suites:
        # After the checks: it loads a model.
        from megatron_longpo.engines.make import make_engine

        engine = make_engine(config.engine, max(config.lengths), keep_prefix=True)
        warn_of_positions(config, share)
        generating = Suites(config, prepared, engine, share, restart=restart)
        begun = [generating.begin(suite) for suite in suites]
        del generating, engine
    short = begin_short(config, prepared, share, restart=restart) if "short" in config.suites else None
    preference = begin_preferences(config, share, restart=restart) if "preference" in config.suites else None
    while begun:
        # Not kept: it holds the model, and two in memory would be one too many.
        suite = begun.pop(0)
        finish(suite.name, suite.run())
        del suite
    platform.CURRENT.free_memory()
    if short is not None:
        finish("short", short.run())
        del short
        platform.CURRENT.free_memory()
    if preference is not None:
        finish("preference", evaluate_preferences(config, share, preference))
    if reported:
        print(f"{output}: report.md, results.json", flush=True)


def check_preferences(config: EvaluationConfig, share: Share) -> None:
    """What can be known of the preference suite before any long work.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that does not fit.
    """
    from megatron_longpo.checkpoint.huggingface import read_hf_config

    p = config.preference
    assert config.engine.model is not None and p.pairs is not None
    read_manifest(p.pairs)
    for folder in (config.engine.model, p.reference_model or config.engine.model):
        read_hf_config(Path(folder))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if share.world_size != world_size:
        raise ConfigError(
            "tasks=preference computes with all processes together; launch them with torchrun, without --rank"
        )
    degrees = p.context_parallel_size * p.tensor_model_parallel_size
    if world_size % degrees:
        raise ConfigError(
            f"context_parallel_size x tensor_model_parallel_size = {degrees} do not divide the {world_size} processes; launch "
            f"a multiple of {degrees}"
        )


def begin_preferences(config: EvaluationConfig, share: Share, *, restart: bool) -> Results:
    """The folder of held-out pairs, open, before any long work."""
    from megatron_longpo.engines.base import model_identity
    from megatron_longpo.training import held_out

    p, model = config.preference, config.engine.model
    assert config.evaluate.output is not None and model is not None and p.pairs is not None
    settings = {
        "version": held_out.VERSION,
        "model": {"model": model_identity(Path(model)), "bf16": computes_in_bf16(Path(model), config.engine.dtype)},
        "reference": model_identity(Path(p.reference_model or model)),
        "pairs": read_manifest(p.pairs).bin_sha256,
        "beta": p.beta,
    }
    return Results(Path(config.evaluate.output) / "preference", settings, share, restart=restart)


def evaluate_preferences(config: EvaluationConfig, share: Share, results: Results) -> dict[str, Any] | None:
    """Held-out pairs by the trainer's own forward: log-probs of the model on the long rows, of the reference on the short.

    The output folder must be one that all processes see.
    """
    import torch.distributed as dist

    from megatron_longpo.config import from_dict
    from megatron_longpo.conversion.import_hf import import_hf
    from megatron_longpo.runtime.collectives import on_rank0
    from megatron_longpo.runtime.process_groups import start_processes, stop_processes
    from megatron_longpo.training import held_out
    from megatron_longpo.training.plan import make_plan
    from megatron_longpo.training.session import open_session

    p, model = config.preference, config.engine.model
    assert config.evaluate.output is not None and model is not None and p.pairs is not None
    output = Path(config.evaluate.output)
    folder, settings = results.folder, results.settings
    reference = p.reference_model or model
    results.wait_for_parts()
    start_processes(30)
    found = stored_result(output, "preference", settings)
    if found is not None:
        if share.rank == 0:
            print("preference: done before", flush=True)
        dist.barrier()
        results.close()
        stop_processes()
        return found if share.rank == 0 else None
    # Where a killed run left its copies, they are in the way.
    work = folder / "work"
    if share.rank == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    dist.barrier()
    checkpoints = {"model": work / "model", "reference": work / ("model" if reference == model else "reference")}
    import_hf(model, checkpoints["model"])
    if reference != model:
        import_hf(reference, checkpoints["reference"])
    degrees = p.context_parallel_size * p.tensor_model_parallel_size
    values = {
        "data": {"valid_data_path": p.pairs},
        "objective": {"beta": p.beta},
        "reference": {"reference_load": str(checkpoints["reference"]), "reference_cache": str(folder / "reference")},
        "parallel": {
            "context_parallel_size": p.context_parallel_size,
            "tensor_model_parallel_size": p.tensor_model_parallel_size,
        },
        "training": {
            "skip_train": True,
            "global_batch_size": share.world_size // degrees,
            "bf16": settings["model"]["bf16"],
        },
        "checkpoint": {"load": str(checkpoints["model"])},
    }
    session = open_session(make_plan(from_dict(values, "preference"), share.world_size))
    session.score_reference()
    session.load_weights()
    # From one process: all are to leave out the same samples.
    kept = on_rank0(lambda: held_out.kept_metrics(results.rows()))
    if kept and share.rank == 0:
        print(f"preference: {len(kept)} samples were there", flush=True)

    def keep(numbers: Sequence[int], table: held_out.Table) -> None:
        if share.rank == 0:
            results.add(held_out.kept_rows(numbers, table))

    table = session.held_out.evaluate(kept, keep)
    dist.barrier()
    results.close()
    stop_processes()
    if share.rank:
        return None
    shutil.rmtree(work, ignore_errors=True)
    held_out.write_rows(table, folder / "samples.jsonl", settings["pairs"])
    metrics = held_out.summary(table)
    return {"settings": settings, "asked": {"preference": metrics["samples"]}, "metrics": metrics}


def computes_in_bf16(model: Path, dtype: str) -> bool:
    """What the trainer computes in: fp32 where that is asked for or stored, else bf16."""
    if dtype != "auto":
        return dtype != "float32"
    from megatron_longpo.checkpoint.huggingface import read_hf_config

    config = read_hf_config(model)
    return str(config.get("dtype", config.get("torch_dtype"))) != "float32"


def stored_result(output: Path, suite: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What results.json has of a suite with these settings, or None."""
    from megatron_longpo.evaluation.report import read_results

    if not (output / "results.json").exists():
        return None
    found = read_results(output)["suites"].get(suite)
    if found is None or found["settings"] != json.loads(json.dumps(settings)):
        return None
    return found if (output / suite / "samples.jsonl").exists() else None


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be made ({error}); name a folder") from None


def warn_of_positions(config: EvaluationConfig, share: Share) -> None:
    """Lengths beyond what a model says of itself are measured, and said."""
    try:
        plain = json.loads((Path(config.engine.model or "") / "config.json").read_text(encoding="utf-8"))
        positions = int(plain["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    beyond = [n for n in config.lengths if n > positions]
    if beyond and share.rank == 0:
        print(
            f"note: the model says it has {positions} positions; lengths {', '.join(map(str, beyond))} go beyond",
            flush=True,
        )


def share_of(config: EvaluationConfig) -> Share:
    """Which part this process does."""
    e = config.evaluate
    if e.rank is not None and e.world_size is not None:
        return Share(e.rank, e.world_size)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), together=True)
    return Share()


def compare_command(arguments: list[str]) -> None:
    """Compare the folders after --compare; write to --output."""
    from megatron_longpo.evaluation.compare import write_comparison

    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument(
        "--compare", nargs="+", metavar="DIR", required=True, help="evaluations; the others against the first"
    )
    parser.add_argument("--output", metavar="DIR", default="comparison", help="folder of table and picture")
    parser.add_argument("--seed", type=int, default=1234, help="of the bootstrap")
    a = parser.parse_args(arguments)
    write_comparison([Path(f) for f in a.compare], Path(a.output), a.seed)
    print(f"{a.output}: comparison.md, comparison.json, comparison.png", flush=True)


if __name__ == "__main__":
    run_or_fail(main)
