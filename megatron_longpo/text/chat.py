"""Conversations as pieces of tokens: fast tokenizers, SentencePiece models and chat templates behind one small class.

A conversation is rendered as text by its template and tokenised in pieces (document, question, answer), so that a document is
tokenised once and the tokens of each answer are known. A piece that continues a text is tokenised as a continuation: a
SentencePiece tokenizer puts a space before the first word of a text, and must not do so in the middle of one.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from megatron_longpo.data.sequence import IntArray
from megatron_longpo.data.vocabulary import folder_vocabulary_hash, sentencepiece_vocabulary, vocabulary_hash
from megatron_longpo.errors import DataError, one_line

Message = dict[str, str]

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
        vocabulary_hash, template_hash: what manifests and stages identify it by.
        special_ids: ids of special tokens; one of them ends every answer.
        special_texts: texts of the special tokens.
    """

    name: str
    vocab_size: int
    vocabulary_hash: str
    template_hash: str
    special_ids: frozenset[int]
    special_texts: tuple[str, ...]

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
        """Ids of the special tokens that the template puts directly after an answer."""
        answer = "ANSWER"
        messages: list[Message] = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        after = self.render(messages, add_generation_prompt=False).rpartition(answer)[2].lstrip()
        ends = [t for t in self.special_texts if t and after.startswith(t)]
        return frozenset(self.encode(max(ends, key=len), continues=False)) & self.special_ids if ends else frozenset()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text by itself."""
        return [len(self.encode(text, continues=False)) for text in texts]

    @abstractmethod
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render a conversation as text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""

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

    Raises:
        DataError: transformers cannot load it, or there is no template.
    """

    def __init__(self, path: Path, template: str | None, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise DataError(
                f"--tokenizer {path}: transformers cannot load it ({one_line(error)}); give a tokenizer folder"
            ) from None
        if template is not None:
            self._tokenizer.chat_template = template
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"--tokenizer {path}: has no chat template; name one with --chat-template (a file, or one of "
                f"{', '.join(BUILT_IN_TEMPLATES)})"
            )
        self.name = path.name
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        # Hash of the file, as conversion takes it: a tokenizer class may add tokens of its own while loading.
        self.vocabulary_hash = folder_vocabulary_hash(path) or vocabulary_hash(vocabulary)
        self.template_hash = hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest()
        added = self._tokenizer.added_tokens_decoder
        self.special_ids = frozenset(self._tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        self.special_texts = tuple(self._tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))
        # Set if the first word of a text gets a space, which it must not get in the middle of a text.
        self._anchor = "\n" if self._ids("\nx") != self._ids("\n") + self._ids("x") else None

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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class SentencePieceChatTokenizer(ChatTokenizer):
    """A bare SentencePiece .model file with a template.

    Args:
        path: the .model file.
        template: Jinja template.

    Raises:
        DataError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path, template: str) -> None:
        import jinja2.sandbox
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"--tokenizer {path}: is not a SentencePiece model ({error}); give a tokenizer folder or a .model file"
            ) from None
        self._template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            template
        )
        sp = self._processor
        self.name = path.name
        self.vocab_size = int(sp.vocab_size())
        self.vocabulary_hash = vocabulary_hash(sentencepiece_vocabulary(path))
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()
        control = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)}
        # Newer models have control tokens beyond the three of SentencePiece.
        self._special = control
        self.special_ids = frozenset(control.values())
        self.special_texts = tuple(control)
        self._bos, self._eos = sp.id_to_piece(sp.bos_id()), sp.id_to_piece(sp.eos_id())
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")

    def encode(self, text: str, *, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids if i not in self.special_ids]))


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> ChatTokenizer:
    """Load a tokenizer with its chat template.

    Args:
        path: folder that transformers loads, or a SentencePiece ``.model`` file.
        chat_template: name of a built-in template, or a file with a Jinja template; None keeps the tokenizer's own.
        trust_remote_code: run code from the tokenizer's folder.

    Raises:
        DataError: there is no tokenizer, or no template.
    """
    path = Path(path)
    template = None
    if chat_template is not None:
        if chat_template in BUILT_IN_TEMPLATES:
            template = BUILT_IN_TEMPLATES[chat_template]
        elif Path(chat_template).is_file():
            template = Path(chat_template).read_text(encoding="utf-8")
        else:
            raise DataError(
                f"--chat-template {chat_template}: no such file; name a file, or one of {', '.join(BUILT_IN_TEMPLATES)}"
            )
    if not path.exists():
        raise DataError(f"--tokenizer {path}: no such file or folder; give a tokenizer folder or a .model file")
    if path.is_file():
        if template is None:
            raise DataError(
                f"--tokenizer {path}: a SentencePiece model has no chat template; name one with --chat-template (a file, "
                f"or one of {', '.join(BUILT_IN_TEMPLATES)})"
            )
        return SentencePieceChatTokenizer(path, template)
    return FastChatTokenizer(path, template, trust_remote_code)


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


def encode_sample(tokenizer: ChatTokenizer, context: str, turns: Sequence[Turn]) -> Sample:
    """Tokenise a document with its turns.

    Args:
        tokenizer: tokenizer with its chat template.
        context: the document.
        turns: its turns, at least one.

    Returns:
        The sample's pieces.

    Raises:
        BadRow: the template does not render prompts followed by answers, or puts no special token after an answer.
    """
    encoder = _Encoder(tokenizer)
    head, tail = encoder.first_prompt(context, turns[0].instruction)
    pieces = [encoder.piece("", head, CONTEXT)]
    # Text before the next prompt, and the prompt.
    before, prompt = head, tail
    history: dict[Mode, list[Message]] = {
        side: [user_message(context, turns[0].instruction)] for side in (Mode.CHOSEN, Mode.REJECTED)
    }
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
            encoded = encoder.answer(history[side], answer)
            pieces.append(Piece(encoded.tokens, mode))
            history[side].append({"role": "assistant", "content": answer})
            if number + 1 < len(turns):
                history[side].append({"role": "user", "content": turns[number + 1].instruction})
                following.append((encoded.end, encoded.rest + encoder.next_prompt(history[side])))
        if following:
            if following[0] != following[1]:
                # Only with a template that writes answers into later prompts.
                raise BadRow("template", "the template renders a turn's prompt differently after another answer")
            before, prompt = following[0]
        short = [user_message(turn.short_context, turn.instruction)]
        pieces.append(encoder.piece("", tokenizer.render(short, add_generation_prompt=True), SHORT_PROMPT))
        for answer, mode in ((turn.chosen, SHORT_CHOSEN_RESPONSE), (turn.rejected, SHORT_REJECTED_RESPONSE)):
            pieces.append(Piece(encoder.answer(short, answer).tokens, mode))
    return Sample(tuple(pieces))


@dataclass(frozen=True)
class _EncodedAnswer:
    """An answer in tokens.

    Attributes:
        tokens: token ids, the end-of-turn token included.
        end: text of the end-of-turn token.
        rest: text that the template puts after it.
    """

    tokens: IntArray
    end: str
    rest: str


class _Encoder:
    """Renders and tokenises the parts of a conversation."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer

    def piece(self, before: str, text: str, mode: Mode) -> Piece:
        """Piece of a text that follows ``before``."""
        return Piece(np.array(self._tokenizer.encode_after(before, text), np.int64), mode)

    def first_prompt(self, context: str, instruction: str) -> tuple[str, str]:
        """The first prompt as text, cut in two where the document ends."""
        text = self._tokenizer.render([user_message(context, instruction)], add_generation_prompt=True)
        end = text.rfind(QUESTION_SEPARATOR + instruction)
        if end < 0:
            # The template may have trimmed the message; the cut is then before the bare instruction.
            end = text.rfind(instruction.strip())
        if end < 0:
            raise BadRow("template", "the chat template does not render the instruction")
        return text[:end], text[end:]

    def answer(self, history: Sequence[Message], answer: str) -> _EncodedAnswer:
        """Tokenise an answer that follows ``history``."""
        tokenizer = self._tokenizer
        prompt = tokenizer.render(history, add_generation_prompt=True)
        whole = tokenizer.render([*history, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise BadRow("template", "the chat template does not render an answer after its prompt")
        text = whole[len(prompt) :]
        ends = [(text.rfind(t) + len(t), t) for t in tokenizer.special_texts if t in text]
        if not ends:
            raise BadRow("no_end_of_turn", "the chat template ends an answer with no special token")
        # The model does not write what follows the end-of-turn token (in ChatML, a line feed).
        cut, end = max(ends)
        tokens = np.array(tokenizer.encode_after(prompt, text[:cut]), np.int64)
        return _EncodedAnswer(tokens=tokens, end=end, rest=text[cut:])

    def next_prompt(self, history: Sequence[Message]) -> str:
        """Text between an answer and the next one: the user's message and what surrounds it."""
        before = self._tokenizer.render(history[:-1], add_generation_prompt=False)
        whole = self._tokenizer.render(history, add_generation_prompt=True)
        if not whole.startswith(before):
            raise BadRow("template", "the chat template does not render a turn after the one before")
        return whole[len(before) :]


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
