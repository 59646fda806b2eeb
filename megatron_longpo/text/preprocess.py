"""Preference JSONL, or rows of the published tokenised schema, to indexed binaries: streaming, parallel, resumable.

Input lines are numbered from 1 over all input files. Workers tokenise and one process writes, in input order, so the output
does not depend on the number of workers. All output files are committed together every ``COMMIT_EVERY`` rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from megatron_longpo.data.indexed import Manifest, SampleWriter, path_of, read_manifest, token_dtype
from megatron_longpo.data.preference import (
    OPTIONAL_COLUMNS,
    TOKENISED_COLUMNS,
    BadRow,
    Mode,
    Sample,
    from_tokenised,
    weight_of,
)
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.arrow import read_batches
from megatron_longpo.runtime.files import FolderLock, check_checksum, open_regular, sha256_of
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.parquet import check_pages
from megatron_longpo.runtime.progress import Progress
from megatron_longpo.runtime.reading import (
    DEFAULT_READING,
    ReadingConfig,
    TooLarge,
    WrongFormat,
    check_expansion,
    opened,
    parse_json,
    read_json,
    read_json_rows,
)
from megatron_longpo.text.chat import (
    MAX_TURNS_RENDERED_WHOLE,
    ChatTokenizer,
    EarlierAnswers,
    Turn,
    encode_sample,
    load_tokenizer,
    turn_of,
)
from megatron_longpo.text.chat_rows import (
    ROW_KEYS,
    encode_chat_row,
    identical_sides,
    is_chat_row,
    parse_chat_row,
    texts_of,
)
from megatron_longpo.text.documents import files_inside
from megatron_longpo.text.inputs import files_of_split, is_beside_data, log_left_out, refuse_versions, saved_datasets
from megatron_longpo.text.template_guard import TEMPLATE_MEMORY_BYTES, TEMPLATE_SECONDS, TemplateLimitError

COMMIT_EVERY = 64
# Rows read ahead of the workers: ``map`` by itself would read the whole input.
_CHUNK_ROWS = 256
# Rows sent to a worker at once.
_ROWS_PER_TASK = 4
# First rows, among which a readable one is looked for to check the schema.
_SCHEMA_ROWS = 100
# The paper has four turns per document.
MAX_TURNS = 4000
# Characters of a skipped row that are kept.
_RAW_CHARACTERS = 100_000


@dataclass(frozen=True)
class Settings:
    """What determines the output, besides the input.

    Attributes:
        tokenizer: tokenizer folder or .model file; None for tokenised input.
        chat_template: name of a built-in template, or a template file.
        vocab_size: vocabulary size of tokenised input.
        seq_length: longest long row in tokens; longer samples are skipped. None sets no limit.
        short_seq_length: longest short row in tokens (paper: 32768); turns with a longer one are skipped.
        max_turns: most turns of a row; a row with more is skipped.
        max_turns_rendered_whole: the same, if the chat template renders a turn by all earlier ones.
        chat_template_kwargs: arguments of the chat template.
        template_date: the date that the chat template is told, if it asks for one; None: that of the output that is resumed, or
            today's in UTC.
        system_prompt: system message of rows without one of their own, or None.
        earlier_answers: how answers that are not the last are laid out (``encode_sample``).
        template_seconds: longest time that the chat template may take.
        template_memory_bytes: most memory that it may take for that, beyond what the process has.
        trust_remote_code: run code from the tokenizer's folder.
        split: split to read of folders that have several; ``all`` reads all.
        keep_duplicates: keep turns whose answers are equal, and samples that were there before.
        ignore_keys: keys of rows, turns and messages that are left out without a word.
        reading: what is too large to be read.
    """

    tokenizer: str | None = None
    chat_template: str | None = None
    vocab_size: int | None = None
    seq_length: int | None = None
    short_seq_length: int = 32768
    max_turns: int = MAX_TURNS
    max_turns_rendered_whole: int = MAX_TURNS_RENDERED_WHOLE
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: datetime.date | None = None
    system_prompt: str | None = None
    earlier_answers: EarlierAnswers = "finished"
    template_seconds: float = TEMPLATE_SECONDS
    template_memory_bytes: int = TEMPLATE_MEMORY_BYTES
    trust_remote_code: bool = False
    split: str | None = None
    keep_duplicates: bool = False
    ignore_keys: tuple[str, ...] = ()
    reading: ReadingConfig = field(default_factory=ReadingConfig)


@dataclass(frozen=True)
class SkippedRow:
    """A skipped row, or a skipped turn of it.

    Attributes:
        reason: name that it is counted under.
        detail: what is wrong, for people.
        turn: number of the turn, or None for the whole row.
    """

    reason: str
    detail: str
    turn: int | None = None


@dataclass(frozen=True)
class Result:
    """What became of one input row.

    Attributes:
        line: number of the row.
        sample: its sample, or None.
        skipped: what was skipped of it.
        raw: the row's text, shortened.
    """

    line: int
    sample: Sample | None
    skipped: tuple[SkippedRow, ...]
    raw: str


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawRow:
    """An input row: the text of a JSON line, or the columns of a table's row.

    Attributes:
        line: number of the row over all input, from 1.
        text: JSON; None for a table.
        columns: the row of a table.
        skipped: why the row could not be read, or None.
    """

    line: int
    text: str | None
    columns: dict[str, Any] | None = None
    skipped: SkippedRow | None = None


_KINDS = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet", ".arrow")


def input_files(inputs: list[str], limits: ReadingConfig = DEFAULT_READING, *, split: str | None = None) -> list[Path]:
    """Find the input files, in order; a folder stands for its arrow, parquet or JSON files.

    Args:
        inputs: files or folders.
        limits: whether symbolic links are followed that lead out of a folder.
        split: name of the split to read of folders that have several; ``all`` reads all.

    Raises:
        DataError: there is no such file, or one of an unknown kind, or it is not clear which files of a folder are meant.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += files_inside(path, _files_of_folder(path, split), limits)
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"--input {path}: no such file or folder; check the path")
    for path in files:
        if not path.name.endswith(_KINDS):
            raise DataError(f"--input {path}: is of an unknown kind; use .jsonl, .jsonl.gz, .parquet or .arrow")
        try:
            open_regular(path).close()
        except OSError as error:
            raise DataError(f"--input {path}: cannot be read ({error}); name files or folders") from None
    if not files:
        raise DataError(f"--input {' '.join(inputs)}: no file is left; name files or folders")
    return files


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder that are its data."""
    flag = f"--input {folder}"
    saved = saved_datasets(folder, flag, split)
    if saved is not None:
        return saved
    found = [p for p in sorted(folder.glob("**/*")) if p.name.endswith(_KINDS) and not is_beside_data(p, folder)]
    by_kind = {
        kind: [p for p in found if p.name.endswith(endings)]
        for kind, endings in (
            (".arrow", ".arrow"),
            (".parquet", ".parquet"),
            (".jsonl", (".jsonl", ".jsonl.gz", ".jsonl.zst")),
        )
    }
    kinds = [kind for kind, files in by_kind.items() if files]
    if len(kinds) > 1:
        raise DataError(
            f"{flag}: holds {' and '.join(kinds)} files, perhaps the same data; name the files that you mean"
        )
    files = by_kind[kinds[0]] if kinds else found
    if not files:
        raise DataError(f"{flag}: holds no .arrow, .parquet or .jsonl file; give a datasets folder")
    # Settings and the like. Where there is nothing else, .json files may be arrays of rows.
    log_left_out(folder, [p for p in found if p not in files])
    files = files_of_split(folder, files, flag, split)
    refuse_versions(folder, files, flag)
    return files


def read_rows(files: list[Path], skip: int, limits: ReadingConfig = DEFAULT_READING) -> Iterator[RawRow]:
    """Rows of all files after the first ``skip``; memory does not grow with the files."""
    line = 0
    for path in files:
        for row in _read_columns(path, limits) if path.suffix in (".parquet", ".arrow") else _read_lines(path, limits):
            line += 1
            if line > skip:
                yield dataclasses.replace(row, line=line)


def _read_lines(path: Path, limits: ReadingConfig) -> Iterator[RawRow]:
    """Rows of a JSONL file, not numbered yet."""
    try:
        with opened(path, limits) as stream:
            for line in read_json_rows(stream, limits):
                skipped = None if line.too_long is None else SkippedRow("row_too_large", line.too_long)
                try:
                    text = line.raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    text = line.raw.decode("utf-8", errors="backslashreplace")
                    skipped = skipped or SkippedRow("not_utf8", str(error))
                yield RawRow(line=0, text=text.rstrip("\r\n"), skipped=skipped)
    except (TooLarge, WrongFormat) as error:
        raise DataError(f"--input {path}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"--input {path}: cannot be read ({error}); give a whole file") from None


def _read_columns(path: Path, limits: ReadingConfig) -> Iterator[RawRow]:
    """Rows of a parquet or arrow file, not numbered yet. One at a time: long contexts make Python objects of them large."""
    try:
        with open_regular(path) as stream:
            if path.suffix == ".parquet":
                table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
                check_expansion(table.metadata, path.stat().st_size, limits)
                check_pages(path, limits)
                batches = table.iter_batches(batch_size=1)
            else:
                batches = read_batches(pyarrow.memory_map(str(path)), path.stat().st_size, limits)
            for batch in batches:
                # Offsets of a damaged file may lead anywhere in memory.
                batch.validate(full=True)
                for start in range(batch.num_rows):
                    row = batch.slice(start, 1)
                    # Dictionaries are shared between rows, and count for each.
                    if row.nbytes > limits.max_row_bytes:
                        detail = f"the row has {row.nbytes} bytes; max_row_bytes is {limits.max_row_bytes}"
                        yield RawRow(line=0, text=None, columns={}, skipped=SkippedRow("row_too_large", detail))
                    else:
                        yield RawRow(line=0, text=None, columns=row.to_pylist()[0])
    except TooLarge as error:
        raise DataError(f"--input {path}: {error}") from None
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        # ValueError: a name or a text is not UTF-8; OverflowError: a date is beyond Python's.
        raise DataError(
            f"--input {path}: cannot be read ({one_line(error)}); give a whole parquet or arrow file"
        ) from None


# --------------------------------------------------------------------------------------------------
# One row
# --------------------------------------------------------------------------------------------------


def process_row(row: RawRow, settings: Settings, tokenizer: ChatTokenizer | None) -> Result:
    """Make a sample of a row, or give the reasons why not. Only a chat template that exceeds its limits raises.

    Args:
        row: the row.
        settings: schema and limits.
        tokenizer: tokenizer of the text schema; None for the tokenised one.
    """
    skipped: list[SkippedRow] = []
    sample = None
    try:
        sample = _sample_of(row, settings, tokenizer, skipped)
    except BadRow as error:
        skipped.append(SkippedRow(error.reason, str(error)))
    except TemplateLimitError:
        # The template's fault, not the row's: each further row could take as long.
        raise
    except DataError as error:
        skipped.append(SkippedRow("no_response", str(error)))
    except Exception as error:
        # For example a lone surrogate that the tokenizer refuses, or a template that refuses the dialogue.
        skipped.append(SkippedRow("not_encodable", f"{type(error).__name__}: {error}"))
    raw = row.text if row.text is not None else json.dumps(row.columns, default=str)
    return Result(line=row.line, sample=sample, skipped=tuple(skipped), raw=raw[:_RAW_CHARACTERS])


def _sample_of(
    row: RawRow, settings: Settings, tokenizer: ChatTokenizer | None, skipped: list[SkippedRow]
) -> Sample | None:
    """The sample of a row; None if none of its turns is good. Skipped turns are added to ``skipped``."""
    if row.skipped is not None:
        raise BadRow(row.skipped.reason, row.skipped.detail)
    value: Any = row.columns
    if row.text is not None:
        if not row.text.strip():
            raise BadRow("blank_line", "the line is empty")
        try:
            value = parse_json(row.text, settings.reading.max_json_depth)
        except ValueError as error:
            raise BadRow("not_json", str(error)) from None
    if not isinstance(value, dict):
        raise BadRow("not_an_object", "the line is not a JSON object")
    value = {key: item for key, item in value.items() if key not in settings.ignore_keys}
    if unknown := unknown_keys(value, tokenised=tokenizer is None):
        raise BadRow(
            "unknown_key", f"the row has {', '.join(map(repr, unknown))}, which nothing reads; see --ignore-keys"
        )
    turns = value.get("ref_chosen_input_ids" if tokenizer is None else "turns")
    if isinstance(turns, list) and len(turns) > settings.max_turns:
        raise BadRow("too_many_turns", f"the row has {len(turns)} turns; max_turns is {settings.max_turns}")
    if tokenizer is None:
        assert settings.vocab_size is not None
        sample: Sample | None = from_tokenised(value, settings.vocab_size)
    elif is_chat_row(value):
        row_of_chat = parse_chat_row(value, settings.system_prompt)
        for text in texts_of(row_of_chat):
            _check_special(tokenizer, text)
        sample = encode_chat_row(tokenizer, row_of_chat)
    else:
        sample = _text_sample(value, settings, tokenizer, skipped)
    if sample is not None:
        sample.check()
        if not settings.keep_duplicates and identical_sides(sample):
            raise BadRow("identical_answers", "chosen and rejected are the same")
        _check_lengths(sample, settings)
        sample = dataclasses.replace(sample, weight=weight_of(value))
    return sample


_ROW_KEYS = ("id", "weight")
_DOCUMENT_KEYS = ("context", "turns", "system")


def unknown_keys(value: dict[str, Any], *, tokenised: bool) -> list[str]:
    """Keys of a row that nothing reads. Columns of a table that are null in a row do not count."""
    if tokenised:
        known: tuple[str, ...] = (*TOKENISED_COLUMNS, *OPTIONAL_COLUMNS)
    else:
        known = ROW_KEYS if is_chat_row(value) else _DOCUMENT_KEYS
    return sorted(key for key, item in value.items() if item is not None and key not in (*_ROW_KEYS, *known))


def _text_sample(
    value: dict[str, Any], settings: Settings, tokenizer: ChatTokenizer, skipped: list[SkippedRow]
) -> Sample | None:
    context, turns = value.get("context"), value.get("turns")
    if not isinstance(context, str) or not context.strip():
        raise BadRow("no_context", "context is missing, empty or not text")
    if not isinstance(turns, list) or not turns:
        raise BadRow("no_turn", "turns is missing, empty or not a list")
    _check_special(tokenizer, context)
    system = _system_of(value, settings, tokenizer)
    good: list[Turn] = []
    for number, turn in enumerate(turns):
        try:
            if isinstance(turn, dict):
                turn = {key: item for key, item in turn.items() if key not in settings.ignore_keys}
            parsed = turn_of(turn, context)
            for part in (parsed.instruction, parsed.chosen, parsed.rejected):
                _check_special(tokenizer, part)
            short = encode_sample(tokenizer, parsed.short_context, [parsed], system=system)
            longest = max(short.length(Mode.SHORT_CHOSEN), short.length(Mode.SHORT_REJECTED))
            if longest > settings.short_seq_length:
                raise BadRow(
                    "short_row_too_long",
                    f"the short row has {longest} tokens, --short-seq-length is {settings.short_seq_length}",
                )
            if not settings.keep_duplicates and identical_sides(short, (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED)):
                raise BadRow("identical_answers", "chosen and rejected are the same")
            good.append(parsed)
        except BadRow as error:
            skipped.append(SkippedRow(error.reason, str(error), turn=number))
    if not good:
        return None
    return encode_sample(
        tokenizer,
        context,
        good,
        system=system,
        earlier_answers=settings.earlier_answers,
        max_turns_rendered_whole=settings.max_turns_rendered_whole,
    )


def _system_of(value: dict[str, Any], settings: Settings, tokenizer: ChatTokenizer) -> str | None:
    """System message of a row: its own, or that of all rows."""
    system = value.get("system")
    if system is None:
        return settings.system_prompt
    if not isinstance(system, str):
        raise BadRow("wrong_type", "system is not text")
    _check_special(tokenizer, system)
    return system


def _check_special(tokenizer: ChatTokenizer, text: str) -> None:
    """Raise BadRow for a text that spells a special token: it would end the dialogue in its middle."""
    for special in tokenizer.special_texts:
        if special in text:
            raise BadRow("special_token_in_text", f"the text spells the special token {special}")


def _check_lengths(sample: Sample, settings: Settings) -> None:
    """Raise BadRow for a sample with a row beyond the limits."""
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

# Set once in each worker process.
_worker: tuple[Settings, ChatTokenizer | None] | None = None


def _start_worker(settings: Settings) -> None:
    global _worker
    _worker = (settings, tokenizer_of(settings))


def _work(row: RawRow) -> Result:
    assert _worker is not None
    return process_row(row, *_worker)


def tokenizer_of(settings: Settings) -> ChatTokenizer | None:
    """The tokenizer of text rows; None if they are tokenised already."""
    if settings.tokenizer is None:
        return None
    return load_tokenizer(
        settings.tokenizer,
        settings.chat_template,
        trust_remote_code=settings.trust_remote_code,
        template_seconds=settings.template_seconds,
        template_memory_bytes=settings.template_memory_bytes,
        template_kwargs=settings.chat_template_kwargs,
        template_date=settings.template_date,
    )


def preprocess(
    inputs: list[str],
    prefix: str | Path,
    settings: Settings,
    *,
    workers: int = 1,
    restart: bool = False,
) -> Manifest:
    """Make PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.rejects.jsonl, or resume an interrupted run.

    Args:
        inputs: files or folders.
        prefix: path prefix of the outputs.
        settings: tokenizer and limits.
        workers: processes that tokenise.
        restart: discard existing output.

    Returns:
        The manifest, as in PREFIX.json.

    Raises:
        DataError: the input, the tokenizer or the output cannot be used, or no sample is left.
    """
    _check_settings(settings)
    files = input_files(inputs, settings.reading, split=settings.split)
    if settings.template_date is None and not restart:
        settings = dataclasses.replace(settings, template_date=_recorded_date(prefix))
    tokenizer = tokenizer_of(settings)
    if tokenizer is not None:
        # The workers' clocks may be past midnight.
        settings = dataclasses.replace(settings, template_date=tokenizer.template_date)
        if settings.system_prompt is not None and not tokenizer.renders_system:
            raise DataError(
                f"--system-prompt {settings.system_prompt!r}: the chat template has no system messages; leave the prompt out, or "
                "choose another --chat-template"
            )
    vocab_size = tokenizer.vocab_size if tokenizer else int(settings.vocab_size or 0)
    _check_schema(files, tokenizer is not None, settings.reading, settings.ignore_keys)
    source = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files]
    for path, record in zip(files, source, strict=True):
        check_checksum(path, str(record["sha256"]))
    described = {
        k: getattr(settings, k)
        for k in ("seq_length", "short_seq_length", "vocab_size")
        if getattr(settings, k) is not None
    }
    # What is not used leaves no trace, so that output of earlier versions is recognised.
    if settings.chat_template_kwargs:
        described["chat_template_kwargs"] = dict(settings.chat_template_kwargs)
    if settings.system_prompt is not None:
        described["system_prompt"] = settings.system_prompt
    if settings.keep_duplicates:
        described["keep_duplicates"] = True
    if settings.ignore_keys:
        described["ignore_keys"] = sorted(settings.ignore_keys)
    if settings.earlier_answers != Settings.earlier_answers:
        described["earlier_answers"] = settings.earlier_answers
    date = tokenizer.template_date.isoformat() if tokenizer is not None and tokenizer.asks_for_date else None
    if date is not None:
        described["template_date"] = date
    manifest = Manifest(
        vocab_size=vocab_size,
        dtype=token_dtype(vocab_size),
        tokenizer=tokenizer.name if tokenizer else None,
        tokenizer_hash=tokenizer.vocabulary_hash if tokenizer else None,
        template_hash=tokenizer.template_hash if tokenizer else None,
        answer_end_ids=sorted(tokenizer.answer_ends()) if tokenizer else [],
        independent_turns=tokenizer is not None,
        source=source,
        settings=described,
        chat_template=tokenizer.template if tokenizer else None,
        chat_template_kwargs=dict(settings.chat_template_kwargs),
        template_date=date,
        system_prompt=settings.system_prompt,
        special_tokens=dict(tokenizer.special_tokens) if tokenizer else {},
    )
    identity = [source, described, manifest.tokenizer_hash, manifest.template_hash, manifest.dtype]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if not restart and path_of(prefix, "json").exists() and not path_of(prefix, "partial").exists():
        old = read_manifest(prefix)
        if [old.source, old.settings, old.tokenizer_hash, old.template_hash, old.dtype] == identity:
            log(f"{path_of(prefix, 'json')}: already made from this input with these settings")
            return old
    with _held(Path(prefix)):
        writer = SampleWriter(prefix, manifest, fingerprint, restart=restart)
        rows_done = writer.position.get("rows", 0)
        if writer.resumed:
            log(f"resuming after row {rows_done}")
        tokens_done = writer.manifest.tokens
        try:
            with Progress("preprocess", done=rows_done, unit="rows") as progress:
                for result in _results(files, rows_done, settings, tokenizer, workers):
                    _add(writer, result, keep_duplicates=settings.keep_duplicates)
                    rows_done = result.line
                    if rows_done % COMMIT_EVERY == 0:
                        writer.commit({"rows": rows_done})
                        progress.add(rows_done - progress.done, tokens=writer.manifest.tokens - tokens_done)
                        tokens_done = writer.manifest.tokens
                writer.manifest.rows = rows_done
                writer.commit({"rows": rows_done})
                progress.add(rows_done - progress.done, tokens=writer.manifest.tokens - tokens_done)
        except BaseException:
            writer.close()
            raise
        return writer.finish()


@contextlib.contextmanager
def _held(prefix: Path) -> Iterator[None]:
    """Hold PREFIX.partial, so that one process at a time writes an output.

    Raises:
        DataError: another process does.
    """
    folder = path_of(prefix, "partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FolderLock(folder, name=prefix, record=True):
            yield
    finally:
        # What was refused before anything was written leaves nothing.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_settings(settings: Settings) -> None:
    """Raise DataError for settings that do not say how rows become tokens."""
    if (settings.tokenizer is None) == (settings.vocab_size is None):
        raise DataError("give either --tokenizer (for text) or --vocab-size (for rows that are already tokenised)")
    if settings.vocab_size is not None and settings.vocab_size < 1:
        raise DataError(f"--vocab-size {settings.vocab_size} must be positive; give the model's vocabulary size")


def first_results(inputs: list[str], settings: Settings, count: int) -> Iterator[Result]:
    """What becomes of the first rows of an input, until there are some samples. Nothing is written.

    Args:
        inputs: files or folders.
        settings: tokenizer and limits.
        count: number of samples.

    Raises:
        DataError: the input or the tokenizer cannot be used.
    """
    _check_settings(settings)
    files = input_files(inputs, settings.reading, split=settings.split)
    tokenizer = tokenizer_of(settings)
    _check_schema(files, tokenizer is not None, settings.reading, settings.ignore_keys)
    for row in read_rows(files, 0, settings.reading):
        result = process_row(row, settings, tokenizer)
        yield result
        count -= result.sample is not None
        if count <= 0:
            return


def _recorded_date(prefix: str | Path) -> datetime.date | None:
    """The date that the templates of an output were told, finished or broken off; None: there is none."""
    for path, keys in ((path_of(prefix, "partial") / "progress.json", ("manifest",)), (path_of(prefix, "json"), ())):
        try:
            content = read_json(path)
            for key in keys:
                content = content[key]
            return datetime.date.fromisoformat(content["template_date"])
        except (OSError, ValueError, KeyError, TypeError):
            # Whoever resumes the output reports what is wrong with it.
            continue
    return None


def _add(writer: SampleWriter, result: Result, *, keep_duplicates: bool) -> None:
    """Write what became of a row."""
    for skipped in result.skipped:
        record: dict[str, Any] = {"line": result.line, "detail": skipped.detail}
        if skipped.turn is not None:
            record["turn"] = skipped.turn
        writer.skip(skipped.reason, {**record, "row": result.raw})
    if result.sample is not None:
        number = None if keep_duplicates else writer.duplicate_of(result.sample)
        if number is None:
            writer.add(result.sample)
        else:
            detail = f"the row makes the same sample as one before it, number {number} of the output (from 0)"
            writer.skip("duplicate", {"line": result.line, "detail": detail, "row": result.raw})
    elif all(skipped.turn is not None for skipped in result.skipped):
        writer.skip("no_turn_left", {"line": result.line, "detail": "none of its turns is good", "row": result.raw})


def _results(
    files: list[Path], skip: int, settings: Settings, tokenizer: ChatTokenizer | None, workers: int
) -> Iterator[Result]:
    """Results of all rows after the first ``skip``, in order."""
    rows = read_rows(files, skip, settings.reading)
    if workers <= 1:
        for row in rows:
            yield process_row(row, settings, tokenizer)
        return
    # Spawned, not forked: a tokenizer's own threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (settings,)) as pool:
            chunk: list[RawRow] = []
            for row in rows:
                chunk.append(row)
                if len(chunk) == _CHUNK_ROWS:
                    yield from pool.map(_work, chunk, chunksize=_ROWS_PER_TASK)
                    chunk = []
            yield from pool.map(_work, chunk, chunksize=_ROWS_PER_TASK)
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} workers died, probably out of memory; rerun with fewer --workers to resume"
        ) from None


def _check_schema(files: list[Path], text: bool, limits: ReadingConfig, ignored: tuple[str, ...] = ()) -> None:
    """Raise DataError if the first readable row is not of the schema that the flags say: every row would be skipped."""
    for row in read_rows(files, 0, limits):
        if row.line > _SCHEMA_ROWS:
            return
        value: Any = row.columns
        if row.text is not None:
            try:
                value = parse_json(row.text, limits.max_json_depth)
            except ValueError:
                continue
        if not isinstance(value, dict):
            continue
        tokenised = any(name in value for name in TOKENISED_COLUMNS)
        is_text = "turns" in value or "context" in value or is_chat_row(value)
        if text and tokenised and not is_text:
            raise DataError(f"--input {files[0]}: is already tokenised; give --vocab-size instead of --tokenizer")
        if not text and is_text and not tokenised:
            raise DataError(f"--input {files[0]}: is text; give --tokenizer instead of --vocab-size")
        value = {key: item for key, item in value.items() if key not in ignored}
        if (tokenised or is_text) and (unknown := unknown_keys(value, tokenised=not text)):
            raise DataError(
                f"--input {files[0]}: its rows have {', '.join(map(repr, unknown))}, which nothing reads; correct the names, or "
                f"leave them out with --ignore-keys {' '.join(unknown)}"
            )
        return


def draw_histogram(manifest: Manifest, path: Path) -> None:
    """Draw the lengths of the long rows as a PNG.

    Args:
        manifest: counts.
        path: path of the picture.
    """
    # Slow to import, and only needed at the end.
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
