"""Configuration of pair generation: dataclasses by section, read like the training configuration (``config.py``)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_longpo.config import Sections, check_part
from megatron_longpo.engines.settings import EngineConfig, check_engine
from megatron_longpo.errors import ConfigError
from megatron_longpo.runtime.reading import ReadingConfig
from megatron_longpo.schema import Count, FiniteFloat, NaturalNumber, Range, Temperature, TopP, check_ranges

# The paper's chunk sizes at its target of 131072 tokens. Shorter targets scale them down.
_PAPER_TARGET = 131072
_PAPER_CHUNK = (16384, 30000)
# Tokens per turn of a long row for the template and for the question, each.
_TURN_OVERHEAD = 64


@dataclass(frozen=True)
class DocumentsConfig:
    """Documents that are read, and how they are cut into chunks."""

    documents: tuple[str, ...] = ()
    """Files, folders or globs: .txt, .md, .tex, .jsonl (.gz, .zst), .parquet; for the domain code also source files."""
    domain: Literal["auto", "book", "arxiv", "code", "other"] = "auto"
    """Units that documents are cut into. book and other: paragraphs; arxiv: LaTeX sections; code: files and definitions; auto:
    by the name of a folder if it is one of these, else by the type of file."""
    split: str | None = None
    """Split to read of a folder whose tables are of several, such as train; all: every one."""
    text_column: str = "text"
    """Column of the text in tables (.jsonl, .parquet)."""
    seq_length: Annotated[int, Range(ge=1, fix="the paper uses 131072")] = _PAPER_TARGET
    """Target length of the long rows in tokens, answers included. Lengths below that are not given follow from it."""
    min_document_tokens: NaturalNumber | None = None
    """Shortest document in tokens; shorter ones are skipped. Default: half the target (paper: 64K of 128K)."""
    max_document_tokens: Count | None = None
    """Longest document in tokens. Default: the target minus the questions and answers of all turns."""
    overlong: Literal["drop", "cut", "split"] = "drop"
    """Fate of longer documents. drop: skip (the paper); cut: keep the beginning, up to the end of a unit; split: into
    several documents of that length."""
    min_chunk_tokens: Count | None = None
    """Shortest chunk in tokens. Default: 16384, scaled down with a target below 131072."""
    max_chunk_tokens: Count | None = None
    """Longest chunk in tokens. Default: 30000, scaled down with a target below 131072."""
    chunks_per_document: Count = 4
    """Largest number of chunks, and so of turns, per document, drawn by the seed (paper: 4)."""
    max_documents: Count | None = None
    """Largest number of documents that are read. Default: all."""
    workers: Count = 1
    """Processes that count tokens and cut documents."""


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions about a chunk."""

    questions_per_chunk: Count = 4
    """Number of questions that the model is asked to write; one of them is drawn (paper: 4)."""
    question_prompt: str = (
        "Write {count} questions that can be answered from the text above. Number them from 1 to {count}, one a line, each "
        "clear by itself, and write nothing else."
    )
    """Instruction that follows the chunk; {count} stands for the number of questions."""
    question_pattern: str = r"^[ \t]*(?:\*\*)?\d+[ \t]*[.):][ \t]*(?:\*\*[ \t]*)?(\S.*)$"
    """Regular expression, applied line by line, whose first group is a question."""
    question_tokens: Count = 512
    """Largest number of tokens in the reply that holds the questions."""
    question_temperature: Temperature = 0.7
    """Sampling temperature of the questions; 0: greedy."""
    question_top_p: TopP = 0.9
    """Nucleus sampling of the questions: probability mass that is kept."""
    question_tries: Count = 1
    """Largest number of replies, one after the other, until one has the right number of questions."""
    lead_ins: tuple[str, ...] = (
        "Based on the preceding descriptions, ",
        "According to the text above, ",
        "From what has been said before, ",
        "Considering the material above, ",
    )
    """Phrases of which one, drawn by the seed, is put before the question."""


@dataclass(frozen=True)
class AnswersConfig:
    """Answers: from the chunk only (chosen), and from the whole document (rejected)."""

    answer_tokens: Count = 1024
    """Largest number of tokens in an answer."""
    answer_temperature: Temperature = 0.0
    """Sampling temperature; 0: greedy (the paper). The released code uses 1."""
    answer_top_p: TopP = 1.0
    """Nucleus sampling: probability mass that is kept."""
    long_answer_tokens: Count | None = None
    """answer_tokens for answers from the whole document. Default: the same."""
    long_answer_temperature: Temperature | None = None
    """answer_temperature for answers from the whole document. Default: the same."""
    long_answer_top_p: TopP | None = None
    """answer_top_p for answers from the whole document. Default: the same."""
    rotary_base: FiniteFloat | None = None
    """RoPE theta for answers from the whole document, if it exceeds the model's context. In-process engines only. Default: the
    model's."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """RoPE scaling for answers from the whole document, with the numbers below. Default: the model's."""
    rotary_scaling_factor: FiniteFloat | None = None
    """Factor of the scaling."""
    original_max_position_embeddings: Count | None = None
    """Context length before scaling, in tokens."""


@dataclass(frozen=True)
class FiltersConfig:
    """What is skipped, and why."""

    # fmt: off
    refusals: tuple[str, ...] = (
        "i'm sorry", "i am sorry", "i cannot", "i can't", "i'm unable", "i am unable", "as an ai", "as a language model",
        "i don't have access", "i do not have access", "cannot be answered", "not mentioned in the text",
        "does not provide", "doesn't provide", "no information",
    )
    # fmt: on
    """Phrases, in upper or lower case, that make an answer a refusal if they occur in its first refusal_characters."""
    refusal_characters: int = 200
    """Characters at the beginning of an answer that are searched for a refusal."""
    refuse_rejected_too: bool = False
    """Also skip turns whose answer from the whole document is a refusal. Off: that is a mistake to learn from."""
    keep_truncated: bool = False
    """Keep answers that were cut off at the token limit."""
    min_answer_characters: int = 1
    """Shortest answer in characters."""
    max_repeated_ngrams: float = 0.5
    """Largest fraction of an answer's word 4-grams that have occurred in it before (answers of 50 words or more)."""
    max_compression: float = 6.0
    """Largest factor by which zlib compresses an answer (answers of 300 characters or more)."""
    max_quoted_words: float = 0.6
    """Largest fraction of a question's words, of four letters or more, that also occur in the instruction: beyond it the question
    quotes the instruction."""
    min_question_words: int = 3
    """Shortest question in words."""
    max_question_words: int = 80
    """Longest question in words."""
    short_seq_length: int = 32768
    """Longest short row in tokens (paper: 32768)."""
    languages: tuple[str, ...] = ()
    """Languages of questions and answers, as ISO 639-1 codes (extra `language`). Default: any."""
    min_language_probability: float = 0.5
    """Smallest probability of the detected language."""


@dataclass(frozen=True)
class RunConfig:
    """The output, and the part of the work that this process does."""

    output: str | None = None
    """Preference JSONL. OUTPUT.work (stages) and OUTPUT.report stand beside it."""
    seed: int = 1234
    """Seed of everything that is drawn."""
    rank: int | None = None
    """Number of the part that this process does, from 0. Default: torchrun's RANK, the number of a Slurm array's task, or all
    parts."""
    world_size: int | None = None
    """Number of parts. Default: torchrun's WORLD_SIZE, the size of the Slurm array, or 1."""
    report_samples: int = 20
    """Number of samples shown in the report."""


@dataclass(frozen=True)
class GenerationConfig(Sections):
    """Configuration of pair generation."""

    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def document_batch(self) -> int:
        """Number of documents that stay together however the work is divided."""
        return self.engine.documents_at_once if self.engine.engine == "transformers" else 1

    @property
    def chunk_tokens(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest chunk."""
        documents = self.documents
        scale = min(1.0, documents.seq_length / _PAPER_TARGET)
        shortest, longest = documents.min_chunk_tokens, documents.max_chunk_tokens
        return (
            max(1, int(_PAPER_CHUNK[0] * scale)) if shortest is None else shortest,
            max(2, int(_PAPER_CHUNK[1] * scale)) if longest is None else longest,
        )

    @property
    def long_sampling(self) -> tuple[int, float, float]:
        """Largest number of tokens, temperature and top-p of the answers from the whole document."""
        answers = self.answers
        tokens, temperature = answers.long_answer_tokens, answers.long_answer_temperature
        top_p = answers.long_answer_top_p
        return (
            answers.answer_tokens if tokens is None else tokens,
            answers.answer_temperature if temperature is None else temperature,
            answers.answer_top_p if top_p is None else top_p,
        )

    @property
    def document_tokens(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest document."""
        documents = self.documents
        per_turn = max(self.answers.answer_tokens, self.long_sampling[0]) + 2 * _TURN_OVERHEAD
        longest = documents.max_document_tokens
        if longest is None:
            longest = documents.seq_length - documents.chunks_per_document * per_turn
        shortest = documents.min_document_tokens
        if shortest is None:
            shortest = min(documents.seq_length // 2, longest)
        return shortest, longest


def check(config: GenerationConfig) -> None:
    """Check what a configuration says by itself, before documents or the model are read.

    Raises:
        ConfigError: the first value that breaks a rule.
    """
    check_ranges(config)
    if not config.documents.documents:
        raise ConfigError("documents is not given; name files, folders or globs with --documents")
    if config.run.output is None:
        raise ConfigError("output is not given; name the preference JSONL with --output")
    _check_lengths(config)
    _check_questions(config.questions)
    check_engine(config.engine)
    if config.engine.engine == "openai" and (config.answers.rotary_base or config.answers.rope_type):
        raise ConfigError(
            "rotary_base and rope_type have no effect with engine=openai, where RoPE is configured on the server; leave them "
            "out, and start the server with them"
        )
    check_part(config.run.rank, config.run.world_size)


def _check_lengths(config: GenerationConfig) -> None:
    """Rules between the lengths of chunks, documents and rows."""
    smallest, largest = config.chunk_tokens
    if smallest > largest:
        raise ConfigError(f"min_chunk_tokens={smallest} is above max_chunk_tokens={largest}; lower it")
    if largest - smallest < largest // 4:
        raise ConfigError(
            f"min_chunk_tokens={smallest} is too near max_chunk_tokens={largest}: chunks could not be packed between the two; "
            "keep them at least a quarter of max_chunk_tokens apart"
        )
    shortest, longest = config.document_tokens
    if longest < 1 or shortest > longest:
        raise ConfigError(
            f"documents of {shortest} to {longest} tokens are asked for: seq_length={config.documents.seq_length} leaves "
            f"{longest} beside {config.documents.chunks_per_document} turns with answers of "
            f"{config.answers.answer_tokens} tokens; raise seq_length, or lower answer_tokens, chunks_per_document or "
            "min_document_tokens"
        )
    if smallest > longest:
        raise ConfigError(
            f"min_chunk_tokens={smallest} is above the longest document of {longest} tokens; lower it or raise seq_length"
        )


def _check_questions(questions: QuestionsConfig) -> None:
    """Rules of the texts that questions are made with."""
    pattern_text, prompt = questions.question_pattern, questions.question_prompt
    try:
        pattern = re.compile(pattern_text, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"question_pattern={pattern_text!r} is not a regular expression ({error}); correct it, or leave it out"
        ) from None
    if pattern.groups < 1:
        raise ConfigError(f"question_pattern={pattern_text!r} has no group; put the question in (...)")
    try:
        prompt.format(count=1)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"question_prompt={prompt!r} cannot be filled in ({error!r}); only {{count}} may stand in braces, write {{{{ and "
            "}}}} for braces"
        ) from None
    if not questions.lead_ins:
        raise ConfigError('lead_ins is empty; give at least one phrase, "" for none')
