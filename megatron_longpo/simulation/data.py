"""The run that is simulated: a checkpoint of which only the shape is there, and samples of the wanted length."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.checkpoint.folders import resolve
from megatron_longpo.config import (
    CheckpointConfig,
    Config,
    LoggingConfig,
    data_parallel_size,
    data_sources,
    from_dict,
    virtual_pipeline_size,
)
from megatron_longpo.data import preference as p
from megatron_longpo.data.indexed import Manifest, PreferenceData, SampleWriter, token_dtype
from megatron_longpo.errors import CheckpointError, ConfigError, one_line
from megatron_longpo.model.families import shape_from_hf
from megatron_longpo.model.shape import FILE_NAME, MAX_BYTES, ModelShape, largest_size
from megatron_longpo.runtime.reading import read_json
from megatron_longpo.simulation.request import Request
from megatron_longpo.training.plan import RunPlan, make_plan

QUESTION_TOKENS = 16
SHORT_TOKENS = 1024


def plan_of(request: Request, folder: Path) -> RunPlan:
    """Make the trainer's plan for a request.

    Args:
        request: what is simulated.
        folder: temporary folder for the checkpoint's shape and the samples.

    Raises:
        LongPOError: as for ``make_plan``.
    """
    config: Config = from_dict(request.config, "simulation")
    shape = _shape(request, config)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    shape.write(checkpoint)
    # What tells a checkpoint from another folder.
    (checkpoint / ".metadata").touch()
    batch = _batch_size(request, config, shape)
    # Equal samples of a micro batch would share their document.
    samples = _samples(request, config, shape, batch if config.training.micro_batch_size > 1 else 1)
    write_samples(samples, shape, folder / "samples", count=batch)
    training = dataclasses.replace(
        config.training, global_batch_size=batch, train_iters=config.training.train_iters or 1000, skip_train=False
    )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, data_path=str(folder / "samples"), valid_data_path=None, shuffle=False, verify_data=False
        ),
        reference=dataclasses.replace(config.reference, reference_load=None),
        training=training,
        # Nothing is evaluated, written or logged.
        checkpoint=CheckpointConfig(load=str(checkpoint)),
        logging=LoggingConfig(),
    )
    return make_plan(config, request.world_size)


def _shape(request: Request, config: Config) -> ModelShape:
    shape = ModelShape(**request.shape) if request.shape is not None else read_shape(request.model, config)
    # In place of the hash of weights that are not there.
    return shape.replace(weights_hash="simulated")


def read_shape(model: str | None, config: Config, *, flag: str = "model") -> ModelShape:
    """Shape of a model.

    Args:
        model: path of a folder with ``model.json`` or Hugging Face's ``config.json``, or of such a file; None: the
            configuration's ``load``.
        config: configuration of the run.
        flag: name of the option that gives the model, for errors.

    Raises:
        ConfigError, CheckpointError: neither is given, or it cannot be read.
    """
    if model is None:
        if config.checkpoint.load is None:
            raise ConfigError(f"neither {flag} nor load is given; name a model with --{flag} DIR or --load CKPT")
        return ModelShape.read(resolve(config.checkpoint.load, weights=False))
    path = Path(model)
    names = (FILE_NAME, "config.json")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file():
        raise ConfigError(
            f"{flag}={model} has neither {FILE_NAME} nor config.json; name a folder or a file with the shape of a model"
        )
    if file.name == FILE_NAME:
        return ModelShape.read(file.parent)
    return shape_from_hf(_read(file), str(file))


def _read(file: Path) -> dict[str, Any]:
    """A model's config.json."""
    try:
        content = read_json(file, largest_size(MAX_BYTES))
        if isinstance(content, dict):
            return content
        problem: object = "it is not a JSON object"
    except (OSError, ValueError) as error:
        problem = error
    raise CheckpointError(f"{file}: cannot be read ({one_line(problem)}); name the shape of a model with --model")


def _samples(request: Request, config: Config, shape: ModelShape, count: int) -> list[p.Sample]:
    """So many of the longest samples that there could be, no two of them equal; fewer if there are no more."""
    if request.tokens is not None:
        return [
            made_up_sample(
                request.tokens,
                answer=request.answer_tokens,
                turns=request.turns,
                vocab_size=shape.vocab_size,
                seed=seed,
            )
            for seed in range(count)
        ]
    if config.data.data_path is None:
        raise ConfigError(
            "neither tokens nor data_path is given; give the length of a row with --tokens, or --data-path"
        )
    data_sets = [PreferenceData(source.prefix, verify=False) for source in data_sources(config.data.data_path)]
    data = max(data_sets, key=lambda d: int(d.long_lengths().max()))
    return [data[int(i)] for i in np.argsort(data.long_lengths())[::-1][:count]]


def _batch_size(request: Request, config: Config, shape: ModelShape) -> int:
    """Samples of a global batch that has only as many micro batches as the peak needs."""
    data_size = data_parallel_size(config, request.world_size)
    each = config.training.micro_batch_size * data_size
    stages = config.parallel.pipeline_model_parallel_size
    # One; with a pipeline, as many as fill it on every stage.
    needed = 1 if stages == 1 else stages * (2 if virtual_pipeline_size(config.parallel, shape.num_layers) else 1)
    count = request.micro_batches or min(config.training.global_batch_size // each, needed)
    return each * count


def made_up_sample(
    tokens: int, *, answer: int, turns: int, vocab_size: int, short: int = SHORT_TOKENS, seed: int = 0
) -> p.Sample:
    """A sample whose chosen row has ``tokens`` tokens, and whose short rows have a chunk of up to ``short``.

    Raises:
        ConfigError: there is no room for a document.
    """
    shortest = turns * (QUESTION_TOKENS + answer) + 1
    if tokens < shortest:
        raise ConfigError(
            f"tokens={tokens} must be at least {shortest} for {turns} turn(s) with answers of {answer} tokens; raise it, or "
            "lower --answer-tokens"
        )
    rng = np.random.default_rng(seed)

    def run(n: int) -> np.ndarray:
        return rng.integers(0, vocab_size, n).astype(np.int64)

    document = run(tokens - turns * (QUESTION_TOKENS + answer))
    pieces = [p.Piece(document, p.CONTEXT)]
    for turn in range(turns):
        question, chosen, rejected = run(QUESTION_TOKENS), run(answer), run(max(1, answer * 3 // 4))
        pieces.append(p.Piece(question, p.PROMPT))
        if turn:
            pieces.append(p.Piece(question, p.Mode.OWN_PROMPT))
        pieces += [
            p.Piece(chosen, p.CHOSEN_RESPONSE),
            p.Piece(rejected, p.REJECTED_RESPONSE),
            p.Piece(np.concatenate([document[:short], question]), p.SHORT_PROMPT),
            p.Piece(chosen, p.SHORT_CHOSEN_RESPONSE),
            p.Piece(rejected, p.SHORT_REJECTED_RESPONSE),
        ]
    return p.Sample(tuple(pieces))


def write_samples(samples: list[p.Sample], shape: ModelShape, prefix: Path, *, count: int) -> None:
    manifest = Manifest(
        vocab_size=shape.vocab_size,
        dtype=token_dtype(shape.vocab_size),
        tokenizer=None,
        tokenizer_hash=None,
        template_hash=None,
    )
    writer = SampleWriter(prefix, manifest, "simulation")
    for number in range(count):
        writer.add(samples[number % len(samples)])
    writer.finish()
