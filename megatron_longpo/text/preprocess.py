"""Preference JSONL, or the published tokenised rows, into indexed binaries: streaming, parallel, resumable.

Input lines are numbered from 1 over all input files. Workers tokenise, one process writes, in input order, so that the
output does not depend on the number of workers; every so many rows all files are made safe together.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.data.indexed import Manifest, SampleWriter, path_of, read_manifest, token_dtype
from megatron_longpo.data.preference import TOKENISED_COLUMNS, BadRow, Mode, Sample, from_tokenised
from megatron_longpo.errors import DataError
from megatron_longpo.runtime.files import sha256_of
from megatron_longpo.text.chat import ChatTokenizer, Turn, encode_sample, load_tokenizer, turn_of

COMMIT_EVERY = 64
_READ_ROWS = 256
_RAW_LIMIT = 100_000


@dataclass(frozen=True)
class Settings:
    """What determines the output, besides the input.

    Attributes:
        tokenizer: folder or .model file; None for tokenised input.
        chat_template: built-in name or file.
        vocab_size: for tokenised input.
        seq_length: longest long row; longer samples are kept aside.
        short_seq_length: longest short row (paper: 32768); turns with a longer one are kept aside.
        trust_remote_code: of the tokenizer's folder.
    """

    tokenizer: str | None = None
    chat_template: str | None = None
    vocab_size: int | None = None
    seq_length: int | None = None
    short_seq_length: int = 32768
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SkippedRow:
    """A line, or a turn of it, kept aside."""

    reason: str
    detail: str
    turn: int | None = None


@dataclass(frozen=True)
class Result:
    """What became of one input row."""

    line: int
    sample: Sample | None
    skipped: tuple[SkippedRow, ...]
    raw: str


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawRow:
    """An input row: text of a JSON line, or columns already parsed, or why it could not be read."""

    line: int
    text: str | None
    columns: dict[str, Any] | None = None
    error: str | None = None


def input_files(inputs: list[str]) -> list[Path]:
    """Input files in order; a datasets folder stands for its arrow or parquet files.

    Raises:
        DataError: nothing there, or a kind of file that is not read.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = (
                sorted(path.glob("**/*.arrow")) or sorted(path.glob("**/*.parquet")) or sorted(path.glob("*.jsonl*"))
            )
            if not found:
                raise DataError(f"--input {path}: holds no .arrow, .parquet or .jsonl file; give a datasets folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"--input {path}: there is no such file or folder")
    for path in files:
        if not path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet", ".arrow")):
            raise DataError(f"--input {path}: unknown kind of file; .jsonl, .jsonl.gz, .parquet and .arrow are read")
    return files


def read_rows(files: list[Path], skip: int) -> Iterator[RawRow]:
    """Rows of all files from row ``skip`` on; memory does not grow with the files."""
    line = 0
    for path in files:
        for row in _read_columns(path) if path.suffix in (".parquet", ".arrow") else _read_lines(path):
            line += 1
            if line > skip:
                yield RawRow(line, row.text, row.columns, row.error)


def _read_lines(path: Path) -> Iterator[RawRow]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:  # type: ignore[operator]
            for raw in stream:
                try:
                    yield RawRow(0, raw.decode("utf-8").rstrip("\r\n"))
                except UnicodeDecodeError as error:
                    yield RawRow(0, raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n"), error=str(error))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"--input {path}: cannot be read ({error}); give a whole file") from None


def _read_columns(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16)
        else:
            source = pyarrow.memory_map(str(path))
            try:
                batches = iter(pyarrow.ipc.open_stream(source))
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, 16):
                for columns in batch.slice(start, 16).to_pylist():
                    yield RawRow(0, None, columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"--input {path}: cannot be read ({error}); give a whole parquet or arrow file") from None


# --------------------------------------------------------------------------------------------------
# One row
# --------------------------------------------------------------------------------------------------


def process_row(row: RawRow, settings: Settings, tokenizer: ChatTokenizer | None) -> Result:
    """A sample of a row, or the reasons why not. Never raises for what the row holds."""
    raw = row.text if row.text is not None else json.dumps(row.columns, default=str)
    skipped: list[SkippedRow] = []

    def result(sample: Sample | None) -> Result:
        return Result(row.line, sample, tuple(skipped), raw[:_RAW_LIMIT])

    if row.error is not None:
        skipped.append(SkippedRow("not_utf8", row.error))
        return result(None)
    value: Any = row.columns
    if row.text is not None:
        if not row.text.strip():
            skipped.append(SkippedRow("blank_line", "the line is empty"))
            return result(None)
        try:
            value = json.loads(row.text)
        except (ValueError, RecursionError) as error:
            skipped.append(SkippedRow("not_json", str(error)))
            return result(None)
    if not isinstance(value, dict):
        skipped.append(SkippedRow("not_an_object", "the line is not a JSON object"))
        return result(None)
    try:
        if tokenizer is None:
            assert settings.vocab_size is not None
            sample = from_tokenised(value, settings.vocab_size)
        else:
            found = _text_sample(value, settings, tokenizer, skipped)
            if found is None:
                return result(None)
            sample = found
        sample.check()
        _check_lengths(sample, settings)
    except BadRow as error:
        skipped.append(SkippedRow(error.reason, str(error)))
        return result(None)
    except DataError as error:
        skipped.append(SkippedRow("no_response", str(error)))
        return result(None)
    except Exception as error:
        # A lone surrogate that the tokenizer does not take, a template that refuses the dialogue.
        skipped.append(SkippedRow("not_encodable", f"{type(error).__name__}: {error}"))
        return result(None)
    return result(sample)


def _text_sample(
    value: dict[str, Any], settings: Settings, tokenizer: ChatTokenizer, skipped: list[SkippedRow]
) -> Sample | None:
    context, turns = value.get("context"), value.get("turns")
    if not isinstance(context, str) or not context.strip():
        raise BadRow("no_context", "context is missing, empty or not text")
    if not isinstance(turns, list) or not turns:
        raise BadRow("no_turn", "turns is missing, empty or not a list")
    _check_special(tokenizer, context)
    good: list[Turn] = []
    for number, turn in enumerate(turns):
        try:
            parsed = turn_of(turn, context)
            for part in (parsed.instruction, parsed.chosen, parsed.rejected):
                _check_special(tokenizer, part)
            short = encode_sample(tokenizer, parsed.short_context, [parsed])
            longest = max(short.length(Mode.SHORT_CHOSEN), short.length(Mode.SHORT_REJECTED))
            if longest > settings.short_seq_length:
                raise BadRow(
                    "short_row_too_long",
                    f"the short row has {longest} tokens, --short-seq-length is {settings.short_seq_length}",
                )
            good.append(parsed)
        except BadRow as error:
            skipped.append(SkippedRow(error.reason, str(error), turn=number))
    return encode_sample(tokenizer, context, good) if good else None


def _check_special(tokenizer: ChatTokenizer, text: str) -> None:
    """A text that spells a special token would end the dialogue in its middle."""
    for special in tokenizer.special_texts:
        if special in text:
            raise BadRow("special_token_in_text", f"the text spells the special token {special}")


def _check_lengths(sample: Sample, settings: Settings) -> None:
    if settings.seq_length is not None and sample.long_length > settings.seq_length:
        raise BadRow(
            "long_row_too_long", f"the long row has {sample.long_length} tokens, --seq-length is {settings.seq_length}"
        )
    for number, turn in enumerate(sample.turn_pieces()):
        for side in (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED):
            length = sum(len(p.tokens) for p in turn if p.mode & side)
            if length > settings.short_seq_length:
                raise BadRow(
                    "short_row_too_long",
                    f"the short row of turn {number} has {length} tokens, --short-seq-length is {settings.short_seq_length}",
                )


# --------------------------------------------------------------------------------------------------
# The whole input
# --------------------------------------------------------------------------------------------------

_worker: tuple[Settings, ChatTokenizer | None] | None = None


def _start_worker(settings: Settings) -> None:
    global _worker
    _worker = (settings, _tokenizer_of(settings))


def _work(row: RawRow) -> Result:
    assert _worker is not None
    return process_row(row, *_worker)


def _tokenizer_of(settings: Settings) -> ChatTokenizer | None:
    if settings.tokenizer is None:
        return None
    return load_tokenizer(settings.tokenizer, settings.chat_template, trust_remote_code=settings.trust_remote_code)


def preprocess(
    inputs: list[str],
    prefix: str | Path,
    settings: Settings,
    *,
    workers: int = 1,
    restart: bool = False,
    progress: Callable[[int, Manifest], None] = lambda *_: None,
    log: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Make PREFIX.bin, .idx, .json and .rejects.jsonl.

    Args:
        inputs: files or folders.
        prefix: of the outputs.
        settings: tokenizer and limits.
        workers: processes that tokenise.
        restart: throw away what an interrupted run has done.
        progress: called with rows read so far and the counts.
        log: for lines of text.

    Raises:
        DataError: input, tokenizer or output that cannot be used, or no sample left.
    """
    if (settings.tokenizer is None) == (settings.vocab_size is None):
        raise DataError(
            "give either --tokenizer (text with a chat template) or --vocab-size (rows that are tokenised already)"
        )
    if settings.vocab_size is not None and settings.vocab_size < 1:
        raise DataError(f"--vocab-size {settings.vocab_size} must be positive")
    files = input_files(inputs)
    tokenizer = _tokenizer_of(settings)
    vocab_size = tokenizer.vocab_size if tokenizer else int(settings.vocab_size or 0)
    _check_schema(files, tokenizer is not None)
    source = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files]
    described = {
        k: getattr(settings, k)
        for k in ("seq_length", "short_seq_length", "vocab_size")
        if getattr(settings, k) is not None
    }
    manifest = Manifest(
        vocab_size=vocab_size,
        dtype=token_dtype(vocab_size),
        tokenizer=tokenizer.name if tokenizer else None,
        tokenizer_hash=tokenizer.vocabulary_hash if tokenizer else None,
        template_hash=tokenizer.template_hash if tokenizer else None,
        independent_turns=tokenizer is not None,
        source=source,
        settings=described,
    )
    identity = [source, described, manifest.tokenizer_hash, manifest.template_hash, manifest.dtype]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if not restart and path_of(prefix, "json").exists() and not path_of(prefix, "partial").exists():
        old = read_manifest(prefix)
        if [old.source, old.settings, old.tokenizer_hash, old.template_hash, old.dtype] == identity:
            log(f"{path_of(prefix, 'json')}: is there already, made from this input with these settings")
            return old
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    writer = SampleWriter(prefix, manifest, fingerprint, restart=restart)
    rows_done = writer.position.get("rows", 0)
    if writer.resumed:
        log(f"going on after row {rows_done}")
    try:
        for result in _results(files, rows_done, settings, tokenizer, workers):
            for bad in result.skipped:
                record: dict[str, Any] = {"line": result.line, "detail": bad.detail}
                if bad.turn is not None:
                    record["turn"] = bad.turn
                writer.skip(bad.reason, {**record, "row": result.raw})
            if result.sample is not None:
                writer.add(result.sample)
            elif not result.skipped or all(r.turn is not None for r in result.skipped):
                writer.skip(
                    "no_turn_left", {"line": result.line, "detail": "none of its turns is good", "row": result.raw}
                )
            rows_done = result.line
            if rows_done % COMMIT_EVERY == 0:
                writer.commit({"rows": rows_done})
                progress(rows_done, writer.manifest)
        writer.commit({"rows": rows_done})
    except BaseException:
        writer.close()
        raise
    progress(rows_done, writer.manifest)
    return writer.finish()


def _results(
    files: list[Path], skip: int, settings: Settings, tokenizer: ChatTokenizer | None, workers: int
) -> Iterator[Result]:
    rows = read_rows(files, skip)
    if workers <= 1:
        for row in rows:
            yield process_row(row, settings, tokenizer)
        return
    # Not forked: a tokenizer's own threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (settings,)) as pool:
            # Chunks bound the memory: map alone would read the whole input ahead of its workers.
            chunk: list[RawRow] = []
            for row in rows:
                chunk.append(row)
                if len(chunk) == _READ_ROWS:
                    yield from pool.map(_work, chunk, chunksize=4)
                    chunk = []
            yield from pool.map(_work, chunk, chunksize=4)
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} workers died, most likely for want of memory; run again with fewer --workers: it goes on"
        ) from None


def _check_schema(files: list[Path], text: bool) -> None:
    """Whether the first readable row is of the schema that the flags say; a whole file of skipped rows helps nobody."""
    for row in read_rows(files, 0):
        if row.line > 100:
            return
        value: Any = row.columns
        if row.text is not None:
            try:
                value = json.loads(row.text)
            except (ValueError, RecursionError):
                continue
        if not isinstance(value, dict):
            continue
        tokenised = any(name in value for name in TOKENISED_COLUMNS)
        is_text = "turns" in value or "context" in value
        if text and tokenised and not is_text:
            raise DataError(f"--input {files[0]}: is tokenised already; give --vocab-size instead of --tokenizer")
        if not text and is_text and not tokenised:
            raise DataError(f"--input {files[0]}: is text; give --tokenizer instead of --vocab-size")
        return


def draw_histogram(manifest: Manifest, path: Path) -> None:
    """Lengths of the long rows as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bins = sorted((int(k), v) for k, v in manifest.length_histogram.items())
    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    axis.bar([f"≤ {b:,}" for b, _ in bins], [n for _, n in bins])
    axis.set_xlabel("tokens of the long row")
    axis.set_ylabel("samples")
    axis.set_title(f"{manifest.samples} samples, {manifest.turns} turns, {manifest.tokens:,} tokens")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
