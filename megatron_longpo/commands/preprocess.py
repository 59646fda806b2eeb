"""``megatron-longpo preprocess``, or ``tools/preprocess_preference_data.py``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from megatron_longpo.command_line import Switch, parse
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.log import log
from megatron_longpo.runtime.reading import ReadingConfig
from megatron_longpo.schema import Count, NaturalNumber, PositiveFiniteFloat, Range, check_ranges

if TYPE_CHECKING:
    from megatron_longpo.text.preprocess import Settings


@dataclass(frozen=True)
class PreprocessOptions:
    """Flags of preprocessing."""

    input: tuple[str, ...]
    """Preference pairs: .jsonl, .jsonl.gz, .parquet, .arrow, or a folder that datasets saved."""
    output_prefix: str
    """Path prefix of the outputs: PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.rejects.jsonl, PREFIX.lengths.png."""
    split: str | None = None
    """Split to read of a folder that has several, such as train; all: every one."""
    tokenizer: str | None = None
    """Tokenizer folder, SentencePiece .model file, or a model of the hub, org/name or org/name@revision. Text input needs it."""
    chat_template: str | None = None
    """Template file, or one of mistral, mistral-v3, llama-2, chatml, plain, text, or a name among the tokenizer's own. Default:
    the tokenizer's own."""
    chat_template_kwargs: str | None = None
    """Arguments of the chat template as JSON, such as '{"enable_thinking": false}'."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) for a chat template that asks for the current one. Default: that of the output which is resumed, or
    today's in UTC."""
    system_prompt: str | None = None
    """System message of the rows that have none of their own (key system)."""
    earlier_answers: Literal["finished", "as_answered"] = "finished"
    """Answers of earlier turns, where the chat template renders the last answer differently. finished: as in the finished
    dialogue, without thinking that the template drops from there; as_answered: each as the last of its dialogue, as the model
    wrote it."""
    vocab_size: int | None = None
    """Vocabulary size of rows that are already tokenised."""
    seq_length: int | None = None
    """Longest long row in tokens; longer samples are skipped. Default: no limit."""
    short_seq_length: int = 32768
    """Longest short row in tokens; longer samples are skipped."""
    max_turns: Count = 4000
    """Most turns of a row; rows with more are skipped."""
    max_turns_rendered_whole: Count = 400
    """Most turns of a row if the chat template renders a turn by all earlier ones, which takes time that grows with the square
    of the turns; rows with more are skipped."""
    template_seconds: PositiveFiniteFloat = 10.0
    """Longest time that the chat template may take to render a row."""
    template_memory_bytes: Annotated[int, Range(ge=2**26)] = 2**31
    """Most memory that the chat template may take for that, in bytes, beyond what the process has."""
    keep_duplicates: Switch = False
    """Keep turns whose answers are equal, and rows that make the same sample as an earlier one, which are skipped otherwise."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows and turns that are not read; rows with other unknown keys are skipped."""
    show: NaturalNumber = 0
    """Show so many samples, with tokens coloured by role, on the terminal and as PREFIX.samples.html, and do nothing else."""
    workers: int = 1
    """Processes that tokenise."""
    restart: Switch = False
    """Discard existing output and start over."""
    trust_remote_code: Switch = False
    """Run code from the tokenizer's folder."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)


def preprocess(arguments: Sequence[str], *, prog: str) -> None:
    """Tokenise preference pairs, or pack rows that are already tokenised, into Megatron's indexed binaries."""
    options = parse(PreprocessOptions, arguments, prog=prog, description=preprocess.__doc__ or "")
    if not options.input:
        raise ConfigError("input is empty; name at least one file or folder with --input")
    check_ranges(options)
    # Not before the flags are read: it imports torch and megatron-core.
    from megatron_longpo.data.indexed import path_of
    from megatron_longpo.runtime.hub import model_folder
    from megatron_longpo.text import preprocess as text
    from megatron_longpo.text.template_kwargs import parse_template_kwargs

    settings = text.Settings(
        tokenizer=options.tokenizer and str(model_folder(options.tokenizer)),
        chat_template=options.chat_template,
        vocab_size=options.vocab_size,
        seq_length=options.seq_length,
        short_seq_length=options.short_seq_length,
        max_turns=options.max_turns,
        max_turns_rendered_whole=options.max_turns_rendered_whole,
        chat_template_kwargs=parse_template_kwargs(options.chat_template_kwargs),
        template_date=_date_of(options.template_date),
        system_prompt=options.system_prompt,
        earlier_answers=options.earlier_answers,
        template_seconds=options.template_seconds,
        template_memory_bytes=options.template_memory_bytes,
        trust_remote_code=options.trust_remote_code,
        split=options.split,
        keep_duplicates=options.keep_duplicates,
        ignore_keys=options.ignore_keys,
        reading=options.reading,
    )
    if options.show:
        _show(list(options.input), options.output_prefix, settings, options.show)
        return
    manifest = text.preprocess(
        list(options.input), options.output_prefix, settings, workers=options.workers, restart=options.restart
    )
    text.draw_histogram(manifest, Path(f"{options.output_prefix}.lengths.png"))
    table = Table("samples", "turns", "tokens", "longest row", "skipped", title=options.output_prefix)
    skipped = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.skip_reasons.items())) or "nothing"
    table.add_row(str(manifest.samples), str(manifest.turns), f"{manifest.tokens:,}", f"{manifest.longest:,}", skipped)
    Console().print(table)
    if manifest.skip_reasons:
        log(f"skipped rows, with line numbers: {path_of(options.output_prefix, 'rejects.jsonl')}")


def _show(inputs: list[str], prefix: str, settings: Settings, count: int) -> None:
    """Show the first samples of an input."""
    from megatron_longpo.text import inspection
    from megatron_longpo.text import preprocess as text

    console = Console()
    shown = []
    tokenizer = text.tokenizer_of(settings)
    for result in text.first_results(inputs, settings, count):
        for skipped in result.skipped:
            turn = "" if skipped.turn is None else f", turn {skipped.turn}"
            console.print(f"row {result.line}{turn} is skipped: {skipped.reason} ({skipped.detail})", markup=False)
        if result.sample is not None:
            shown.append(inspection.shown_sample(result.sample, f"row {result.line}", tokenizer))
            console.print(inspection.as_text(shown[-1]))
    console.print(inspection.legend())
    page = Path(f"{prefix}.samples.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    inspection.write_html(page, f"First samples of {', '.join(inputs)}", shown)
    log(f"the same as a page: {page}")


@dataclass(frozen=True)
class InspectOptions:
    """Flags of the inspection of preprocessed data."""

    prefix: Annotated[str, tyro.conf.Positional]
    """Path prefix of the binaries."""
    tokenizer: str | None = None
    """Tokenizer folder or SentencePiece .model file that the data were made with. Without it, samples are shown as ids."""
    samples: tuple[NaturalNumber, ...] = ()
    """Numbers of samples to show as text, from 0."""
    html: str | None = None
    """Page to write, with the same figures and samples."""
    trust_remote_code: Switch = False
    """Run code from the tokenizer's folder."""


def inspect(arguments: Sequence[str], *, prog: str) -> None:
    """Show preprocessed data: counts, lengths, what sharing saves, and samples as text with the role of every token."""
    options = parse(InspectOptions, arguments, prog=prog, description=inspect.__doc__ or "")
    check_ranges(options)
    from megatron_longpo.data.indexed import PreferenceData
    from megatron_longpo.text import inspection
    from megatron_longpo.text.chat import load_tokenizer

    data = PreferenceData(options.prefix, verify=False)
    for number in options.samples:
        if number >= len(data):
            raise ConfigError(
                f"samples={number}: {options.prefix} has {len(data)} samples; name numbers from 0 to {len(data) - 1}"
            )
    tokenizer = None
    if options.tokenizer is not None:
        # Only its tokens are needed, so any template will do.
        tokenizer = load_tokenizer(options.tokenizer, "plain", trust_remote_code=options.trust_remote_code)
        made_with = data.manifest.tokenizer_hash
        if made_with is not None and made_with != tokenizer.vocabulary_hash:
            raise ConfigError(
                f"tokenizer={options.tokenizer} has another vocabulary than {data.manifest.tokenizer}, which {options.prefix} "
                "was made with; name that one"
            )
    tables = inspection.tables_of(data)
    shown = [inspection.shown_sample(data[number], f"sample {number}", tokenizer) for number in options.samples]
    console = Console()
    inspection.print_tables(console, tables)
    for sample in shown:
        console.print(inspection.as_text(sample))
    if shown:
        console.print(inspection.legend())
    if options.html is not None:
        inspection.write_html(Path(options.html), options.prefix, shown, tables)
        log(f"the same as a page: {options.html}")


def _date_of(text: str | None) -> datetime.date | None:
    """The value of ``--template-date``."""
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"template_date={text!r} is not a date; write it as YYYY-MM-DD") from None
