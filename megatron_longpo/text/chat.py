"""Conversations as pieces of tokens: fast tokenizers, SentencePiece models and chat templates behind one small class.

A conversation is rendered as text by its template and tokenised in pieces (document, question, answer), so that a document is
tokenised once and the tokens of each answer are known. A piece that continues a text is tokenised as a continuation: a
SentencePiece tokenizer puts a space before the first word of a text, and must not do so in the middle of one.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from megatron_longpo.checkpoint.checksums import damage_of_small
from megatron_longpo.data.preference import (
    CHOSEN_RESPONSE,
    CONTEXT,
    PROMPT,
    REJECTED_RESPONSE,
    SHORT_CHOSEN_RESPONSE,
    SHORT_PROMPT,
    SHORT_REJECTED_RESPONSE,
    BadRow,
    Mode,
    Piece,
    Sample,
)
from megatron_longpo.data.vocabulary import folder_vocabulary_hash, sentencepiece_vocabulary, vocabulary_hash
from megatron_longpo.errors import DataError, one_line
from megatron_longpo.runtime.reading import TooLarge, read_bytes
from megatron_longpo.text.dialogue import Answer, Dialogue, TurnEnd, common_beginning
from megatron_longpo.text.template_guard import (
    TEMPLATE_MEMORY_BYTES,
    TEMPLATE_SECONDS,
    TemplateLimitError,
    refuse_powers,
    render_bounded,
)
from megatron_longpo.text.template_kwargs import check_template_reads
from megatron_longpo.text.templates import asks_for_date, compiled, marks_answers, render_marked

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

BUILT_IN_TEMPLATES = {
    # Mistral v0.1 and v0.2: the tokenizer's .model file has no template. Source: mistral-common's v1 format.
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    # Mistral v0.3, whose [INST] and [/INST] are tokens. Source: mistral-common's v3 format.
    "mistral-v3": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST]' + message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    # Llama 2 without a system message. Source: the Llama 2 reference code.
    "llama-2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # No template: the bare text, for base models.
    "plain": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    # The bare text with an end after each answer, as TRL lays out rows of plain text.
    "text": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # ChatML, for tokenizers that have its two special tokens.
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


class ChatTokenizer(ABC):
    """A tokenizer with a chat template.

    Attributes:
        name: name of its folder or file.
        vocab_size: upper bound of the ids, exclusive.
        template: the template's source.
        vocabulary_hash, template_hash: what manifests and stages identify it by.
        special_tokens: text -> id of the special tokens.
        template_seconds: longest time that the template may take to render a conversation.
        template_memory_bytes: most memory that it may take for that, beyond what the process has.
        template_kwargs: arguments that every rendering passes to the template, such as ``enable_thinking``.
        template_date: the date that the template is told, if it asks for one.
    """

    name: str
    vocab_size: int
    template: str
    vocabulary_hash: str
    template_hash: str
    special_tokens: dict[str, int]
    template_seconds: float = TEMPLATE_SECONDS
    template_memory_bytes: int = TEMPLATE_MEMORY_BYTES
    template_kwargs: Mapping[str, Any] = MappingProxyType({})
    template_date: datetime.date

    @cached_property
    def asks_for_date(self) -> bool:
        """Whether what the template renders depends on the date."""
        return asks_for_date(self.template)

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template marks what the model writes."""
        return marks_answers(self.template)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens; one of them ends every answer."""
        return frozenset(self.special_tokens.values())

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return tuple(self.special_tokens)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Token ids of ``text`` where it follows ``before``."""
        special = max((t for t in self.special_texts if before.endswith(t)), key=len, default=None)
        if special is None:
            return self.encode(text, continues=bool(before))
        # Tokenizers differ in what they do with the first word after a special token, so the token comes along.
        return self.encode(special + text, continues=False)[1:]

    @abstractmethod
    def encode(self, text: str, *, continues: bool) -> list[int]:
        """Token ids of a text. Special tokens spelled in the text become their ids; none is added.

        Args:
            text: text to tokenise.
            continues: whether other text stands in front of it.
        """

    def answer_ends(self) -> frozenset[int]:
        """Ids of the special tokens that the template puts after an answer."""
        return frozenset(() if self.turn_end is None else (self.turn_end.token,))

    @cached_property
    def turn_end(self) -> TurnEnd | None:
        """The special token that the template puts after an answer, or None.

        It is the last special token of what follows an answer whether or not the dialogue goes on: some templates put one more at
        the end of a dialogue. Others (GLM-4) end an answer only by the token of the next speaker.
        """
        answer = "ANSWER"
        messages: list[Message] = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        closed = self.render(messages, add_generation_prompt=False).rpartition(answer)[2]
        try:
            more = [*messages, {"role": "user", "content": "NEXT"}]
            going_on = self.render(more, add_generation_prompt=False).rpartition(answer)[2]
        except TemplateError:
            # The template is made for single questions.
            going_on = closed
        always = common_beginning(closed, going_on)
        # Of two that end at the same place the longer.
        ends = [(always.rfind(t) + len(t), len(t), t) for t in self.special_tokens if t and t in always]
        if ends:
            text = max(ends)[2]
        else:
            following = closed if any(t and t in closed for t in self.special_tokens) else going_on
            starts = [(following.find(t), -len(t), t) for t in self.special_tokens if t and t in following]
            if not starts:
                return None
            text = min(starts)[2]
        return TurnEnd(text=text, token=self.special_tokens[text], is_rendered=text in closed)

    @cached_property
    def renders_system(self) -> bool:
        """Whether the template has system messages. Some refuse them, leave them out, or take them for answers."""
        question: Message = {"role": "user", "content": "QUESTION"}

        def rendered(role: str) -> str:
            try:
                return self.render([{"role": role, "content": "SYSTEM"}, question], add_generation_prompt=True)
            except TemplateError:
                return ""

        as_system = rendered("system")
        return "SYSTEM" in as_system and as_system != rendered("assistant")

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text by itself."""
        return [len(self.encode(text, continues=False)) for text in texts]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        """Render a conversation as text.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the text ends where the model answers.
            tools: tools that the model may call, as JSON schemas.

        Raises:
            TemplateLimitError: the template takes too much time or memory.
        """
        more = {} if tools is None else {"tools": tools}
        return render_bounded(
            lambda: self._render(messages, add_generation_prompt=add_generation_prompt, **more),
            self.template_seconds,
            self.template_memory_bytes,
        )

    def render_marked(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation as text, and find the answers that the template marks.

        Args:
            messages, add_generation_prompt, tools: as for ``render``.

        Returns:
            The text, and first and last place (exclusive) of each marked part.

        Raises:
            TemplateLimitError: the template takes too much time or memory.
        """
        places: list[tuple[int, int]] = []

        def marked() -> str:
            text, found = render_marked(
                compiled(self.template, self.template_date),
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                arguments={**self._special_variables(), **self.template_kwargs},
            )
            places.extend(found)
            return text

        return render_bounded(marked, self.template_seconds, self.template_memory_bytes), places

    @abstractmethod
    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        """Render a conversation as text, without limits."""

    @abstractmethod
    def _special_variables(self) -> dict[str, str]:
        """Special tokens by the names that templates know them by."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""

    @abstractmethod
    def text_of(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    def prompt(self, messages: Sequence[Message], prefix: str = "") -> list[int]:
        """Token ids that a model answers.

        Args:
            messages: the conversation.
            prefix: beginning of the answer, which the model continues.
        """
        return self.encode(self.render(messages, add_generation_prompt=True) + prefix, continues=False)


class FastChatTokenizer(ChatTokenizer):
    """A tokenizer that transformers loads.

    Args:
        path: tokenizer folder.
        template: Jinja template; None keeps the tokenizer's own.
        trust_remote_code: run code from the folder.
        name: name of one of the tokenizer's own templates, where it has several; by default ``default``.

    Raises:
        DataError: transformers cannot load it, or there is no template, or several and none is the default.
    """

    def __init__(
        self, path: Path, template: str | None, trust_remote_code: bool = False, *, name: str | None = None
    ) -> None:
        self.name = path.name
        try:
            self._load(path, template, trust_remote_code, name)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # a value of a wrong type comes up where transformers first uses it
            raise DataError(
                f"--tokenizer {path}: transformers cannot load it ({one_line(error)}); give a tokenizer folder"
            ) from None

    def _load(self, path: Path, template: str | None, trust_remote_code: bool, name: str | None) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
        if template is not None:
            self._tokenizer.chat_template = template
        elif name is not None or isinstance(self._tokenizer.chat_template, dict):
            self._tokenizer.chat_template = _own_template(path, self._tokenizer.chat_template, name)
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"--tokenizer {path}: has no chat template; name one with --chat-template (a file, or one of "
                f"{', '.join(BUILT_IN_TEMPLATES)})"
            )
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        # Hash of the file, as conversion takes it: a tokenizer class may add tokens of its own while loading.
        self.vocabulary_hash = folder_vocabulary_hash(path) or vocabulary_hash(vocabulary)
        self.template = str(self._tokenizer.chat_template)
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest()
        added = self._tokenizer.added_tokens_decoder
        ids = sorted({*self._tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)})
        self.special_tokens = dict(zip(self._tokenizer.convert_ids_to_tokens(ids), ids, strict=True))
        # Set if the first word of a text gets a space, which it must not get in the middle of a text.
        self._anchor = "\n" if self._ids("\nx") != self._ids("\n") + self._ids("x") else None

    def _special_variables(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._tokenizer.special_tokens_map.items() if isinstance(value, str)}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(self, text: str, *, continues: bool) -> list[int]:
        if not text:
            return []
        if not continues or self._anchor is None:
            return self._ids(text)
        for anchor in (self._anchor, ":", "a\n"):
            head, whole = self._ids(anchor), self._ids(anchor + text)
            # The anchor must not have merged with the text.
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)

    def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        if self.asks_for_date:
            compiled(self.template, self.template_date)
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_kwargs,
            )
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class SentencePieceChatTokenizer(ChatTokenizer):
    """A bare SentencePiece .model file with a template.

    Args:
        path: the .model file.
        template: Jinja template.

    Raises:
        DataError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path, template: str) -> None:
        import sentencepiece

        try:
            self._processor = sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocabulary_hash = vocabulary_hash(sentencepiece_vocabulary(path))
            self.vocab_size = int(sp.vocab_size())
            # Newer models have control tokens beyond the three of SentencePiece.
            control = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)}
            self._bos, self._eos = sp.id_to_piece(sp.bos_id()), sp.id_to_piece(sp.eos_id())
        except MemoryError:
            raise
        except Exception as error:  # pieces that are not UTF-8, ids that it lacks, messages that quote the file
            raise DataError(
                f"--tokenizer {path}: is not a SentencePiece model ({one_line(error)}); give a tokenizer folder or a .model file"
            ) from None
        self.template = template
        self.name = path.name
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()
        self.special_tokens = control
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")

    def encode(self, text: str, *, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                continues = False
            elif part:
                ids += self._encode_plain(part, continues)
        return ids

    def _encode_plain(self, text: str, continues: bool) -> list[int]:
        if not continues:
            return list(self._processor.encode(text))
        for anchor in ("\n", ":"):
            head, whole = self._processor.encode(anchor), self._processor.encode(anchor + text)
            if whole[: len(head)] == head:
                return list(whole[len(head) :])
        return list(self._processor.encode(text))

    def _special_variables(self) -> dict[str, str]:
        return {"bos_token": self._bos, "eos_token": self._eos}

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        return str(
            compiled(self.template, self.template_date).render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_variables(),
                **self.template_kwargs,
            )
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids if i not in self.special_ids]))

    def text_of(self, ids: Sequence[int]) -> str:
        texts = {number: text for text, number in self.special_tokens.items()}
        runs = itertools.groupby(map(int, ids), lambda number: number in texts)
        return "".join(
            "".join(texts[number] for number in run) if is_special else str(self._processor.decode(list(run)))
            for is_special, run in runs
        )


def load_tokenizer(
    path: str | Path,
    chat_template: str | None = None,
    *,
    trust_remote_code: bool = False,
    template_seconds: float = TEMPLATE_SECONDS,
    template_memory_bytes: int = TEMPLATE_MEMORY_BYTES,
    template_kwargs: Mapping[str, Any] | None = None,
    template_date: datetime.date | None = None,
) -> ChatTokenizer:
    """Load a tokenizer with its chat template, and try the template on a short conversation.

    Args:
        path: folder that transformers loads, or a SentencePiece ``.model`` file.
        chat_template: name of a built-in template, of a file with a Jinja template, or of one of the tokenizer's own; None keeps
            the tokenizer's own.
        trust_remote_code: run code from the tokenizer's folder.
        template_seconds: longest time that the template may take to render a conversation.
        template_memory_bytes: most memory that it may take for that, beyond what the process has.
        template_kwargs: arguments of the template, as ``parse_template_kwargs`` reads them.
        template_date: the date that the template is told, if it asks for one; by default today's in UTC. It does not change while
            the tokenizer is in use.

    Raises:
        DataError: there is no tokenizer, or no template, or the template does not work.
        DamagedError: a file of the folder is not as an export wrote it.
    """
    path = Path(path)
    # Neither built in nor a file: perhaps one of the tokenizer's own.
    is_own = path.is_dir() and chat_template not in BUILT_IN_TEMPLATES and not Path(chat_template or "").exists()
    name = chat_template if is_own else None
    template = None if chat_template is None or is_own else _template_named(chat_template, template_memory_bytes)
    where = f"--tokenizer {path}: its chat template" if chat_template is None else f"--chat-template {chat_template}"
    if not path.exists():
        raise DataError(f"--tokenizer {path}: no such file or folder; give a tokenizer folder or a .model file")
    if path.is_dir() and (damage := damage_of_small(path)) is not None:
        raise damage.error()
    if path.is_dir():
        tokenizer: ChatTokenizer = FastChatTokenizer(path, template, trust_remote_code, name=name)
    elif template is None:
        raise DataError(
            f"--tokenizer {path}: a SentencePiece model has no chat template; name one with --chat-template (a file, "
            f"or one of {', '.join(BUILT_IN_TEMPLATES)})"
        )
    else:
        tokenizer = SentencePieceChatTokenizer(path, template)
    tokenizer.template_seconds, tokenizer.template_memory_bytes = template_seconds, template_memory_bytes
    tokenizer.template_kwargs = template_kwargs or {}
    tokenizer.template_date = template_date or datetime.datetime.now(datetime.timezone.utc).date()
    _try_template(tokenizer, where)
    return tokenizer


def _template_named(name: str, memory_bytes: int) -> str:
    """A built-in template, or the content of a file.

    Args:
        name: name of the template, or path of the file.
        memory_bytes: most memory that the template may take, of which its text may be a small part.
    """
    if name in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[name]
    try:
        return read_bytes(Path(name), memory_bytes // _MEMORY_PER_TEMPLATE_BYTE).decode("utf-8")
    except FileNotFoundError:
        raise DataError(
            f"--chat-template {name}: no such file; name a file, or one of {', '.join(BUILT_IN_TEMPLATES)}"
        ) from None
    except TooLarge as error:
        raise DataError(
            f"--chat-template {name}: {error}; shorten it, or raise template_memory_bytes={memory_bytes}, of which a text may "
            f"be 1/{_MEMORY_PER_TEMPLATE_BYTE}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"--chat-template {name}: cannot be read ({error}); name a file with a Jinja template"
        ) from None


# With 2 GiB of memory, a text of 1 MiB.
_MEMORY_PER_TEMPLATE_BYTE = 2**11


def _own_template(path: Path, templates: str | Mapping[str, str] | None, name: str | None) -> str:
    """One of a tokenizer's own templates.

    Args:
        path: tokenizer folder.
        templates: the templates by name, or a single one without a name.
        name: name of the template; None: the default.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if (name or "default") in named:
        return named[name or "default"]
    if name is None:
        raise DataError(
            f"--tokenizer {path}: has chat templates named {', '.join(sorted(named))} and no default; choose one with "
            "--chat-template NAME"
        )
    raise DataError(
        f"--chat-template {name}: no such file; name a file, or one of {', '.join([*BUILT_IN_TEMPLATES, *sorted(named)])}"
    )


def _try_template(tokenizer: ChatTokenizer, where: str) -> None:
    """Raise DataError if the template does not render a question and its answer: every row would fail."""
    import jinja2

    check_template_reads(tokenizer.template, tokenizer.template_kwargs)
    try:
        refuse_powers(tokenizer.template)
        tokenizer.render([{"role": "user", "content": "QUESTION"}], add_generation_prompt=True)
        tokenizer.answer_ends()
    except TemplateLimitError as error:
        raise TemplateLimitError(f"{where}: {error}") from None
    except Exception as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise DataError(
            f"{where}: does not render a short conversation ({line}{type(error).__name__}: {one_line(error)}); correct it"
        ) from None


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------

QUESTION_SEPARATOR = "\n\n"
_TURN_KEYS = ("instruction", "short_context", "chosen", "rejected")


@dataclass(frozen=True)
class Turn:
    """One instruction with its chunk and two answers, as text."""

    instruction: str
    short_context: str
    chosen: str
    rejected: str


def user_message(context: str, instruction: str) -> Message:
    """First user message: the context, a blank line, the instruction (as in the authors' released code)."""
    return {"role": "user", "content": context + QUESTION_SEPARATOR + instruction}


# Rendering a dialogue again at each of its turns takes time that grows with the square of the turns. So a dialogue of more turns
# is rendered turn by turn from its last few messages, and once as a whole to check the result.
_TURNS_RENDERED_WHOLE = 16
_RECENT_MESSAGES = 5
# Characters at the end of a document in which the cut before its question is looked for.
_CUT_CHARACTERS = 256
# Most turns of a dialogue whose template depends on all earlier turns.
MAX_TURNS_RENDERED_WHOLE = 400


EarlierAnswers = Literal["finished", "as_answered"]


def encode_sample(
    tokenizer: ChatTokenizer,
    context: str,
    turns: Sequence[Turn],
    *,
    system: str | None = None,
    earlier_answers: EarlierAnswers = "finished",
    max_turns_rendered_whole: int = MAX_TURNS_RENDERED_WHOLE,
) -> Sample:
    """Tokenise a document with its turns.

    Args:
        tokenizer: tokenizer with its chat template.
        context: the document.
        turns: its turns, at least one.
        system: system message that long and short rows begin with.
        earlier_answers: how answers that are not the last are laid out, where the template renders the last one differently.
            ``finished``: as the template renders them in the finished dialogue, without thinking that it drops from there;
            ``as_answered``: each as the last one of its dialogue, as the model wrote it.
        max_turns_rendered_whole: most turns, if the template renders a turn by all earlier ones: time grows with their square.

    Returns:
        The sample's pieces.

    Raises:
        BadRow: the template does not render prompts followed by answers, or puts no special token after an answer.
    """
    if system is not None and not tokenizer.renders_system:
        raise BadRow("template", "the chat template has no system messages; leave the system message out")
    if len(turns) > _TURNS_RENDERED_WHOLE:
        try:
            sample = _encode_sample(Encoder(tokenizer, system=system, recent=_RECENT_MESSAGES), context, turns)
        except TemplateLimitError:
            raise
        except Exception:
            # Whether the template refuses the dialogue or only its end, the whole of it tells.
            sample = None
        if sample is not None:
            return sample
        if len(turns) > max_turns_rendered_whole:
            raise BadRow(
                "too_many_turns",
                f"the row has {len(turns)} turns, and the chat template renders a turn by more than the one before it; "
                f"max_turns_rendered_whole is {max_turns_rendered_whole}",
            )
    encoder = Encoder(tokenizer, system=system)
    try:
        sample = _encode_sample(encoder, context, turns)
        assert sample is not None
        return sample
    except BadRow as error:
        if error.reason != "template" or len(turns) == 1:
            raise
    # The template renders answers of earlier turns differently once the dialogue goes on.
    located = _finished_turns if earlier_answers == "finished" else _turns_as_answered
    return _encode_located(encoder, context, turns, located(encoder, context, turns))


def _encode_sample(encoder: Encoder, context: str, turns: Sequence[Turn]) -> Sample | None:
    """The sample, if each prompt continues what was rendered before it.

    Returns:
        None if the turns, rendered one by one, are not the dialogue that is rendered as a whole.
    """
    head, tail = encoder.first_prompt(context, turns[0].instruction)
    pieces = [encoder.piece("", head, CONTEXT)]
    # Text before the next prompt, and the prompt.
    before, prompt = head, tail
    history: dict[Mode, list[Message]] = {
        side: encoder.opening(context, turns[0].instruction) for side in (Mode.CHOSEN, Mode.REJECTED)
    }
    texts = {side: [head, tail] for side in history}
    for number, turn in enumerate(turns):
        pieces.append(encoder.piece(before, prompt, PROMPT))
        if number:
            own_head, own = encoder.first_prompt(context, turn.instruction)
            pieces.append(encoder.piece(own_head, own, Mode.OWN_PROMPT))
        following = []
        for side, answer, mode in (
            (Mode.CHOSEN, turn.chosen, CHOSEN_RESPONSE),
            (Mode.REJECTED, turn.rejected, REJECTED_RESPONSE),
        ):
            located = encoder.answer(history[side], answer)
            if len(turns) > 1 and not located.continues_prompt:
                raise BadRow("template", "the chat template does not render an answer after its prompt")
            pieces += encoder.answer_pieces(located, mode)
            texts[side] += [located.lead, located.text, located.rest]
            history[side].append({"role": "assistant", "content": answer})
            if number + 1 < len(turns):
                history[side].append({"role": "user", "content": turns[number + 1].instruction})
                next_prompt = encoder.next_prompt(history[side])
                texts[side].append(next_prompt)
                following.append((located.end, located.rest + next_prompt))
        if following:
            if following[0] != following[1]:
                # Only with a template that writes answers into later prompts.
                raise BadRow("template", "the template renders a turn's prompt differently after another answer")
            before, prompt = following[0]
        pieces += encoder.short_pieces(turn, turn.chosen, turn.rejected)
    for side in history if encoder.renders_recent else ():
        if encoder.render(history[side], add_generation_prompt=False) != "".join(texts[side]):
            return None
    return Sample(tuple(pieces))


@dataclass(frozen=True)
class _LocatedTurn:
    """A turn of a dialogue as text.

    Attributes:
        before: end of the text before its prompt.
        prompt: its prompt, from the end of the turn before.
        chosen, rejected: its answers.
    """

    before: str
    prompt: str
    chosen: Answer
    rejected: Answer


def _finished_turns(encoder: Encoder, context: str, turns: Sequence[Turn]) -> list[_LocatedTurn]:
    """Turns as the template renders them in the finished dialogue."""
    sides = []
    for answers in ([t.chosen for t in turns], [t.rejected for t in turns]):
        history = encoder.opening(context, turns[0].instruction)
        for answer, turn in zip(answers, turns[1:], strict=False):
            history += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn.instruction}]
        prompts, earlier = encoder.dialogue.earlier_answers(history)
        last = encoder.answer(history, answers[-1])
        # What a template marks may begin behind a header of its own.
        prompts[-1] += last.prompt[len(encoder.render(history, add_generation_prompt=True)) :]
        sides.append((prompts, [*earlier, last]))
    (prompts, chosen), (others, rejected) = sides
    if prompts != others:
        raise BadRow("template", "the template renders a turn's prompt differently after another answer")
    return [
        _LocatedTurn(
            before=chosen[number - 1].end if number else "",
            prompt=prompt,
            chosen=chosen[number],
            rejected=rejected[number],
        )
        for number, prompt in enumerate(prompts)
    ]


def _turns_as_answered(encoder: Encoder, context: str, turns: Sequence[Turn]) -> list[_LocatedTurn]:
    """Turns whose answers are each rendered as the last of the dialogue up to there."""
    located: list[_LocatedTurn] = []
    history: dict[bool, list[Message]] = {
        side: encoder.opening(context, turns[0].instruction) for side in (True, False)
    }
    before, prompt = "", encoder.render(history[True], add_generation_prompt=True)
    for number, turn in enumerate(turns):
        chosen = encoder.answer(history[True], turn.chosen)
        rejected = encoder.answer(history[False], turn.rejected)
        located.append(_LocatedTurn(before=before, prompt=prompt, chosen=chosen, rejected=rejected))
        if number + 1 == len(turns):
            break
        following: Message = {"role": "user", "content": turns[number + 1].instruction}
        prompts = {encoder.dialogue.after_answer(history[side], [following]) for side in history}
        if len(prompts) > 1:
            raise BadRow("template", "the template renders a turn's prompt differently after another answer")
        before, prompt = chosen.end, prompts.pop()
        for side, answer in ((True, turn.chosen), (False, turn.rejected)):
            history[side] += [{"role": "assistant", "content": answer}, following]
    return located


def _encode_located(encoder: Encoder, context: str, turns: Sequence[Turn], located: Sequence[_LocatedTurn]) -> Sample:
    """The sample of turns that were located in the rendered dialogue."""
    head, tail = encoder.cut_prompt(located[0].prompt, turns[0].instruction)
    pieces = [encoder.piece("", head, CONTEXT)]
    for number, (turn, text) in enumerate(zip(turns, located, strict=True)):
        prompt = text.prompt if number else tail
        pieces.append(encoder.piece(text.before if number else head, prompt, PROMPT))
        # An answer that is not the last may have lost its thinking, which the short rows then leave out too.
        answers = [
            answer if answer.strip() in found.text else found.content
            for answer, found in ((turn.chosen, text.chosen), (turn.rejected, text.rejected))
        ]
        leads = {found.lead for found in encoder.short_answers(turn, *answers)}
        own_head, own = encoder.first_prompt(context, turn.instruction)
        if len(leads) == 1 and not text.chosen.lead and not text.rejected.lead:
            # Alone behind the document, the answer is a last one.
            own += leads.pop()
        if number or (own_head, own) != (head, tail):
            pieces.append(encoder.piece(own_head, own, Mode.OWN_PROMPT))
        pieces += encoder.answer_pieces(text.chosen, CHOSEN_RESPONSE)
        pieces += encoder.answer_pieces(text.rejected, REJECTED_RESPONSE)
        pieces += encoder.short_pieces(turn, *answers)
    return Sample(tuple(pieces))


class Encoder:
    """Renders and tokenises the parts of a conversation.

    Args:
        tokenizer: tokenizer with its chat template.
        system: system message that every conversation begins with, or None.
        recent: last messages of a conversation that are rendered, an odd number so that a user's is the first; None renders all.
        tools: tools that the model may call, as JSON schemas.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        system: str | None = None,
        recent: int | None = None,
        tools: Tools | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._recent = recent
        self.dialogue = Dialogue(tokenizer, tools)

    @property
    def renders_recent(self) -> bool:
        return self._recent is not None

    def opening(self, context: str, instruction: str) -> list[Message]:
        """The messages that a conversation begins with."""
        return [*self._system, user_message(context, instruction)]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render a whole conversation."""
        return self.dialogue.render(messages, add_generation_prompt=add_generation_prompt)

    def piece(self, before: str, text: str, mode: Mode) -> Piece:
        """Piece of a text that follows ``before``."""
        return Piece(np.array(self._tokenizer.encode_after(before, text), np.int64), mode)

    def first_prompt(self, context: str, instruction: str) -> tuple[str, str]:
        """The first prompt as text, cut in two where the document ends."""
        text = self.render(self.opening(context, instruction), add_generation_prompt=True)
        return self.cut_prompt(text, instruction)

    def cut_prompt(self, text: str, instruction: str) -> tuple[str, str]:
        """A first prompt, cut in two where the document ends."""
        end = text.rfind(QUESTION_SEPARATOR + instruction)
        if end < 0:
            # The template may have trimmed the message; the cut is then before the bare instruction.
            end = text.rfind(instruction.strip())
        if end < 0:
            raise BadRow("template", "the chat template does not render the instruction")
        end = self.end_of_document(text[:end])
        return text[:end], text[end:]

    def end_of_document(self, head: str, following: str = QUESTION_SEPARATOR + "Q") -> int:
        """Where to cut a text that ends with the document, so that both sides tokenised alone have the tokens of the whole.

        Tokenizers join white space with the white space that follows, and some join a full stop with it. So a document that ends
        in white space is cut before that, before its last signs, or before its last word. The cut depends on the document only:
        all prompts of a sample continue it.

        Args:
            head: text that ends with the document.
            following: what comes after it.
        """
        if not head[-1:].isspace():
            return len(head)
        window = head[-_CUT_CHARACTERS:]
        first = len(head) - len(window)
        text = window + following
        whole = self._tokenizer.encode(text, continues=True)
        stripped = len(window.rstrip())
        lettered = next((i for i in range(stripped, 0, -1) if window[i - 1].isalnum()), 0)
        for cut in (stripped, lettered, max(window.rfind(" ", 0, stripped), 0)):
            ids = self._tokenizer.encode(window[:cut], continues=True)
            if cut and ids + self._tokenizer.encode_after(window[:cut], text[cut:]) == whole:
                return first + cut
        return len(head)

    def answer(self, history: Sequence[Message], answer: str) -> Answer:
        """Locate an answer that follows ``history``."""
        return self.dialogue.last_answer(self._window(history), {"role": "assistant", "content": answer})

    def answer_pieces(self, answer: Answer, mode: Mode) -> list[Piece]:
        """Pieces of an answer: empty thinking in front of it, which has no loss, and the answer with its end of turn."""
        whole = self._tokenizer.encode_after(answer.prompt, answer.lead + answer.text)
        if not answer.lead:
            return [Piece(np.array(whole, np.int64), mode)]
        # Where the answer begins with white space, that may be joined with the lead's.
        for lead in (answer.lead, answer.lead.rstrip()):
            ids = self._tokenizer.encode_after(answer.prompt, lead)
            if whole[: len(ids)] == ids:
                break
        return [
            Piece(np.array(whole[: len(ids)], np.int64), mode & ~Mode.RESPONSE),
            Piece(np.array(whole[len(ids) :], np.int64), mode),
        ]

    def short_answers(self, turn: Turn, chosen: str, rejected: str) -> list[Answer]:
        """Locate the answers of a turn that see only its chunk."""
        history = self.opening(turn.short_context, turn.instruction)
        return [self.answer(history, answer) for answer in (chosen, rejected)]

    def short_pieces(self, turn: Turn, chosen: str, rejected: str) -> list[Piece]:
        """Pieces of a turn's short rows."""
        found = self.short_answers(turn, chosen, rejected)
        pieces = [self.piece("", found[0].prompt, SHORT_PROMPT)]
        for answer, mode in zip(found, (SHORT_CHOSEN_RESPONSE, SHORT_REJECTED_RESPONSE), strict=True):
            pieces += self.answer_pieces(answer, mode)
        return pieces

    def next_prompt(self, history: Sequence[Message]) -> str:
        """Text between an answer and the next one: the user's message and what surrounds it."""
        history = self._window(history)
        before = self._tokenizer.render(history[:-1], add_generation_prompt=False)
        whole = self._tokenizer.render(history, add_generation_prompt=True)
        if not whole.startswith(before):
            raise BadRow("template", "the chat template does not render a turn after the one before")
        return whole[len(before) :]

    def _window(self, history: Sequence[Message]) -> Sequence[Message]:
        """The messages that are rendered."""
        if self._recent is None or len(history) <= self._recent + len(self._system):
            return history
        return [*self._system, *history[-self._recent :]]


def turn_of(value: Any, context: str) -> Turn:
    """Parse a turn of the text schema.

    Args:
        value: parsed JSON.
        context: the document that the turn belongs to.

    Raises:
        BadRow: a key is missing, not text or empty, or the chunk is not part of the context.
    """
    if not isinstance(value, dict):
        raise BadRow("wrong_type", "a turn is not an object")
    unknown = sorted(key for key, item in value.items() if item is not None and key not in _TURN_KEYS)
    if unknown:
        raise BadRow(
            "unknown_key", f"the turn has {', '.join(map(repr, unknown))}, which nothing reads; see --ignore-keys"
        )
    for key in _TURN_KEYS:
        if key not in value:
            raise BadRow("missing_key", f"the turn has no {key}")
        if not isinstance(value[key], str):
            raise BadRow("wrong_type", f"{key} is not text")
        if not value[key].strip():
            raise BadRow("empty_turn", f"{key} is empty")
    if value["short_context"] not in context:
        raise BadRow("chunk_not_in_context", "short_context is not part of context")
    return Turn(**{key: value[key] for key in _TURN_KEYS})
