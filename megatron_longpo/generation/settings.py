"""Configuration of pair generation: dataclasses by section, read as the training's is (``megatron_longpo/config.py``)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config import Sections, check_numbers, check_part
from megatron_longpo.engines.settings import EngineConfig, check_engine
from megatron_longpo.errors import ConfigError

# Of the paper's set-up, at its target of 131072 tokens; other targets scale them.
_PAPER_TARGET = 131072
_PAPER_CHUNK = (16384, 30000)
# Room for the template, the questions and the answers of a long row.
_ROOM = 64


@dataclass(frozen=True)
class DocumentsConfig:
    """What is read, and how it is cut."""

    documents: tuple[str, ...] = ()
    """Files, folders or globs: .txt, .md, .tex, .jsonl (.gz, .zst), .parquet; source code too for the domain code."""
    domain: Literal["auto", "book", "arxiv", "code", "other"] = "auto"
    """What documents are cut into: book and other: paragraphs; arxiv: LaTeX sections; code: files and definitions; auto: by
    a folder named like a domain, else by the kind of file."""
    text_column: str = "text"
    """Column of the text in tables (.jsonl, .parquet)."""
    seq_length: int = _PAPER_TARGET
    """Target: tokens of the long rows, answers included. Lengths below follow it where they are not given."""
    min_document_tokens: int | None = None
    """Shorter documents are kept aside. Default: half the target (paper: 64K of 128K)."""
    max_document_tokens: int | None = None
    """Longest document. Default: the target less the answers and questions of all turns."""
    overlong: Literal["drop", "cut", "split"] = "drop"
    """Longer documents: drop (the paper), cut at a unit's end, or split into several of that length."""
    min_chunk_tokens: int | None = None
    max_chunk_tokens: int | None = None
    """Tokens of a chunk. Default: 16384 to 30000, scaled with a target below 131072."""
    chunks_per_document: int = 4
    """Chunks, and so turns, of a document at most, drawn by seed (paper: 4)."""
    max_documents: int | None = None
    """Read so many documents at most."""
    workers: int = 1
    """Processes that count tokens and cut."""


@dataclass(frozen=True)
class QuestionsConfig:
    """What is asked about a chunk."""

    questions_per_chunk: int = 4
    """Questions that the model is asked for, of which one is drawn (paper: 4)."""
    question_prompt: str = (
        "Write {count} questions that can be answered from the text above. Number them from 1 to {count}, one a line, each "
        "clear by itself, and write nothing else."
    )
    """Instruction after the chunk; {count} stands for the number of questions."""
    question_pattern: str = r"^[ \t]*(?:\*\*)?\d+[ \t]*[.):][ \t]*(?:\*\*[ \t]*)?(\S.*)$"
    """Regular expression, line by line, whose first group is a question."""
    question_tokens: int = 512
    """Most tokens of the reply with the questions."""
    question_temperature: float = 0.7
    question_top_p: float = 0.9
    question_tries: int = 1
    """Replies asked for, one after the other, until one holds the right number of questions."""
    lead_ins: tuple[str, ...] = (
        "Based on the preceding descriptions, ",
        "According to the text above, ",
        "From what has been said before, ",
        "Considering the material above, ",
    )
    """Phrases of which one, drawn by seed, is put before the question."""


@dataclass(frozen=True)
class AnswersConfig:
    """How questions are answered: on the chunk (chosen) and on the whole document (rejected)."""

    answer_tokens: int = 1024
    answer_temperature: float = 0.0
    """0: greedy (the paper); the released code has 1."""
    answer_top_p: float = 1.0
    long_answer_tokens: int | None = None
    long_answer_temperature: float | None = None
    long_answer_top_p: float | None = None
    """The same of the answers on the whole document. Default: as on the chunk."""
    rotary_base: float | None = None
    """RoPE theta of the long answers, for a model beyond its range. In-process engines alone."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """RoPE scaling of the long answers, with the numbers below."""
    rotary_scaling_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class FiltersConfig:
    """What is kept aside, by reason."""

    refusals: tuple[str, ...] = (
        *(
            "i'm sorry",
            "i am sorry",
            "i cannot",
            "i can't",
            "i'm unable",
            "i am unable",
            "as an ai",
            "as a language model",
        ),
        *("i don't have access", "i do not have access", "cannot be answered", "not mentioned in the text"),
        *("does not provide", "doesn't provide", "no information"),
    )
    """Phrases that make an answer a refusal, in any case of letters, within its first `refusal_characters`."""
    refusal_characters: int = 200
    refuse_rejected_too: bool = False
    """Also where the answer on the whole document refuses. Off: that is a fault to learn from."""
    keep_truncated: bool = False
    """Keep answers that were cut off at the token limit."""
    min_answer_characters: int = 1
    max_repeated_ngrams: float = 0.5
    """Largest share of word 4-grams of an answer that were there before (of 50 words on)."""
    max_compression: float = 6.0
    """Largest factor by which zlib makes an answer smaller (of 300 characters on)."""
    max_quoted_words: float = 0.6
    """Largest share of a question's words (of four letters on) that the instruction has: it quotes it."""
    min_question_words: int = 3
    max_question_words: int = 80
    short_seq_length: int = 32768
    """Longest short row in tokens (paper)."""
    languages: tuple[str, ...] = ()
    """Languages, as ISO 639-1 codes, of questions and answers; empty: any (extra `language`)."""
    min_language_probability: float = 0.5


@dataclass(frozen=True)
class RunConfig:
    """Where to, and which part."""

    output: str | None = None
    """Preference JSONL. Beside it OUTPUT.work (stages) and OUTPUT.report."""
    seed: int = 1234
    rank: int | None = None
    world_size: int | None = None
    """This part of how many. Default: torchrun's RANK and WORLD_SIZE, a Slurm array's task, or all."""
    report_samples: int = 20
    """Samples to read in the report."""


@dataclass(frozen=True)
class GenerationConfig(Sections):
    """One dataclass a section."""

    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def document_batch(self) -> int:
        """Documents that stay together however the work is split."""
        return self.engine.documents_at_once if self.engine.engine == "transformers" else 1

    @property
    def chunk_tokens(self) -> tuple[int, int]:
        """Smallest and largest chunk."""
        d = self.documents
        scale = min(1.0, d.seq_length / _PAPER_TARGET)
        smallest = d.min_chunk_tokens if d.min_chunk_tokens is not None else max(1, int(_PAPER_CHUNK[0] * scale))
        largest = d.max_chunk_tokens if d.max_chunk_tokens is not None else max(2, int(_PAPER_CHUNK[1] * scale))
        return smallest, largest

    @property
    def long_sampling(self) -> tuple[int, float, float]:
        """Most tokens, temperature and top-p of the long answers."""
        a = self.answers
        given = a.long_answer_tokens, a.long_answer_temperature, a.long_answer_top_p
        usual = a.answer_tokens, a.answer_temperature, a.answer_top_p
        tokens, temperature, top_p = (u if g is None else g for g, u in zip(given, usual, strict=True))
        return int(tokens), float(temperature), float(top_p)

    @property
    def document_tokens(self) -> tuple[int, int]:
        """Shortest and longest document."""
        d = self.documents
        room = d.chunks_per_document * (max(self.answers.answer_tokens, self.long_sampling[0]) + 2 * _ROOM)
        longest = d.max_document_tokens if d.max_document_tokens is not None else d.seq_length - room
        shortest = d.min_document_tokens if d.min_document_tokens is not None else min(d.seq_length // 2, longest)
        return shortest, longest


def check(c: GenerationConfig) -> None:
    """What can be said of a configuration alone.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    if not c.documents.documents:
        raise ConfigError("documents is not given; name files, folders or globs with --documents")
    if c.run.output is None:
        raise ConfigError("output is not given; name the preference JSONL with --output")
    for section in (c.documents, c.questions, c.answers):
        check_numbers(section)
    smallest, largest = c.chunk_tokens
    if smallest > largest:
        raise ConfigError(f"min_chunk_tokens={smallest} is above max_chunk_tokens={largest}; lower it")
    if largest - smallest < largest // 4:
        raise ConfigError(
            f"min_chunk_tokens={smallest} is too near max_chunk_tokens={largest}: texts would be cut into crumbs to fit between "
            "them; leave a quarter of the larger"
        )
    shortest, longest = c.document_tokens
    if longest < 1 or shortest > longest:
        raise ConfigError(
            f"documents of {shortest} to {longest} tokens are asked for: seq_length={c.documents.seq_length} leaves "
            f"{longest} beside {c.documents.chunks_per_document} turns with answers of {c.answers.answer_tokens} tokens; raise "
            "seq_length, or lower answer_tokens, chunks_per_document or min_document_tokens"
        )
    if smallest > longest:
        raise ConfigError(
            f"min_chunk_tokens={smallest} is above the longest document of {longest} tokens; lower it or raise seq_length"
        )
    for name, value in (
        ("question_temperature", c.questions.question_temperature),
        ("answer_temperature", c.answers.answer_temperature),
        ("long_answer_temperature", c.long_sampling[1]),
    ):
        if value < 0:
            raise ConfigError(f"{name}={value} must not be negative; 0 is greedy")
    for name, value in (
        ("question_top_p", c.questions.question_top_p),
        ("answer_top_p", c.answers.answer_top_p),
        ("long_answer_top_p", c.long_sampling[2]),
    ):
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={value} must be above 0 and at most 1")
    try:
        pattern = re.compile(c.questions.question_pattern, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"question_pattern={c.questions.question_pattern!r} is no regular expression ({error})"
        ) from None
    if pattern.groups < 1:
        raise ConfigError(f"question_pattern={c.questions.question_pattern!r} has no group; put the question in (...)")
    try:
        c.questions.question_prompt.format(count=1)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"question_prompt={c.questions.question_prompt!r} cannot be filled in ({error!r}); only {{count}} may stand in "
            "braces, write {{{{ and }}}} for braces"
        ) from None
    if not c.questions.lead_ins:
        raise ConfigError('lead_ins is empty; give at least one phrase, "" for none')
    a = c.answers
    check_engine(c.engine)
    if c.engine.engine == "openai" and (a.rotary_base or a.rope_type):
        raise ConfigError("rotary_base and rope_type are the server's affair with engine=openai; start it with them")
    check_part(c.run.rank, c.run.world_size)
