"""Preference rows as chat messages, or as plain text, in TRL's formats: one dialogue, two answers to it.

A row may have a document (``context``), and a part of it (``short_context``) that the reference sees instead. Both stand where a
message has ``{{context}}``, or before the first user message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_longpo.data.preference import CONTEXT, PROMPT, SHORT_PROMPT, BadRow, Mode, Piece, Sample
from megatron_longpo.runtime.reading import parse_json
from megatron_longpo.text.chat import QUESTION_SEPARATOR, ChatTokenizer, Encoder
from megatron_longpo.text.dialogue import Answer, Message

PLACEHOLDER = "{{context}}"
ROW_KEYS = ("prompt", "chosen", "rejected", "context", "short_context", "system", "tools")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatRow:
    """A dialogue with two answers.

    Attributes:
        prompt: the messages before the answers, with ``{{context}}`` where the document stands if there is one.
        chosen, rejected: the messages of each answer: the assistant's, with calls and results of tools between them.
        context: the document, or None.
        short_context: part of the document, or None.
        tools: tools that the model may call, as JSON schemas, or None.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    context: str | None
    short_context: str | None
    tools: list[Message] | None


# --------------------------------------------------------------------------------------------------
# Parsing
# --------------------------------------------------------------------------------------------------


def is_chat_row(value: dict[str, Any]) -> bool:
    """Whether a row is a dialogue with two answers, and not a document with turns."""
    return value.get("turns") is None and any(value.get(key) is not None for key in ("chosen", "rejected"))


def parse_chat_row(value: dict[str, Any], system: str | None) -> ChatRow:
    """Parse a row.

    Args:
        value: parsed JSON.
        system: system message of rows without one of their own, or None.

    Raises:
        BadRow: a key is missing or of the wrong type, or the messages are no dialogue with two answers.
    """
    for key in ("chosen", "rejected"):
        if value.get(key) is None:
            raise BadRow("missing_key", f"the row has no {key}")
    prompt, chosen, rejected = _messages_of_row(value)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise BadRow("wrong_type", f"{name} does not begin and end with a message of the assistant")
        for message in answer:
            if (
                message["role"] == "assistant"
                and not (message["content"] or "").strip()
                and "tool_calls" not in message
            ):
                raise BadRow("empty_turn", f"{name} has an empty answer")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise BadRow("wrong_type", "the prompt does not end with a message to the assistant")
    own = value.get("system")
    if own is not None and not isinstance(own, str):
        raise BadRow("wrong_type", "system is not text")
    has_system = any(message["role"] == "system" for message in prompt)
    if own is not None and has_system:
        raise BadRow("wrong_type", "the row has the key system and a system message; leave one out")
    first = system if own is None else own
    if first is not None and not has_system:
        prompt = [{"role": "system", "content": first}, *prompt]
    context, short = _contexts(value)
    tools = _without_nulls(value.get("tools"))
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("wrong_type", "tools is not a list of objects")
    return ChatRow(_with_placeholder(prompt, context), chosen, rejected, context, short, tools or None)


def _contexts(value: dict[str, Any]) -> tuple[str | None, str | None]:
    context, short = value.get("context"), value.get("short_context")
    for name, text in (("context", context), ("short_context", short)):
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise BadRow("no_context", f"{name} is empty or not text")
    if short is not None and context is None:
        raise BadRow("no_context", "the row has short_context and no context")
    if short is not None and context is not None and short not in context:
        raise BadRow("chunk_not_in_context", "short_context is not part of context")
    return context, short


def _messages_of_row(value: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers as messages. TRL's rows may have the prompt in both answers only, or there once more."""
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        place = _end_of_common(chosen, rejected)
        prompt, chosen, rejected = chosen[:place], chosen[place:], rejected[place:]
    messages = [] if prompt is None else _messages(prompt, "prompt", "user")
    answers = [_messages(chosen, "chosen", "assistant"), _messages(rejected, "rejected", "assistant")]
    if messages and all(answer[: len(messages)] == messages for answer in answers):
        answers = [answer[len(messages) :] for answer in answers]
    elif prompt is None:
        pairs = list(zip(*answers, strict=False))
        shared = next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))
        # Equal answers share their last message too.
        shared = min([shared, *(_last_prompt(answer) for answer in answers)])
        messages, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    return messages, answers[0], answers[1]


def _last_prompt(answer: Sequence[Message]) -> int:
    """Number of messages up to the last one of a user."""
    return max((number + 1 for number, message in enumerate(answer) if message["role"] == "user"), default=0)


def _end_of_common(first: str, second: str) -> int:
    """Where two texts part, before a blank, as TRL finds the prompt of rows without one."""
    place = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return place - 1 if place and first[place - 1] == " " else place


def _messages(value: Any, name: str, role: str) -> list[Message]:
    """Messages, checked; a text is one message of a role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("wrong_type", f"{name} is neither text nor a list of messages")
    return [_message({k: v for k, v in message.items() if v is not None}, name) for message in value]


def _message(message: Message, name: str) -> Message:
    unknown = sorted(set(message) - set(_MESSAGE_KEYS))
    if unknown:
        raise BadRow("unknown_key", f"a message of {name} has {', '.join(map(repr, unknown))}, which nothing reads")
    if message.get("role") not in _ROLES:
        raise BadRow(
            "wrong_type", f"a message of {name} has the role {message.get('role')!r}; roles are {', '.join(_ROLES)}"
        )
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRow("wrong_type", f"a message of {name} has content other than text")
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    if content is None and not calls:
        raise BadRow("wrong_type", f"a message of {name} has no content")
    if content is not None and not isinstance(content, str):
        raise BadRow("wrong_type", f"the content of a message of {name} is not text")
    made = {**message, "content": content}
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if key in message and not isinstance(message[key], str):
            raise BadRow("wrong_type", f"{key} of a message of {name} is not text")
    if not calls:
        made.pop("tool_calls", None)
        return made
    if (
        message["role"] != "assistant"
        or not isinstance(calls, list)
        or not all(isinstance(call, dict) for call in calls)
    ):
        raise BadRow("wrong_type", f"tool_calls of a message of {name} is not the assistant's list of calls")
    made["tool_calls"] = [_call(_without_nulls(call)) for call in calls]
    return made


def _call(call: Message) -> Message:
    """A call whose arguments are an object: OpenAI's interface has them as JSON text, which templates would quote once more."""
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _json(function["arguments"], "arguments")}
    return {**call, "function": function} if "function" in call else function


def _json(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadRow("wrong_type", f"{name} is not JSON ({error})") from None


def _without_nulls(value: Any) -> Any:
    """A value without keys that are null: in tables all rows have the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_placeholder(prompt: list[Message], context: str | None) -> list[Message]:
    """The prompt with exactly one place for the document, or none if there is no document."""
    count = sum((message["content"] or "").count(PLACEHOLDER) for message in prompt)
    if context is None:
        if count:
            raise BadRow("no_context", f"a message has {PLACEHOLDER} and the row has no context")
        return prompt
    if count > 1:
        raise BadRow("wrong_type", f"the messages have {PLACEHOLDER} {count} times; the document stands in one place")
    if count:
        return prompt
    number = next((n for n, message in enumerate(prompt) if message["role"] == "user"), None)
    if number is None:
        raise BadRow("wrong_type", f"the prompt has neither a user's message nor {PLACEHOLDER} for the context")
    asked = prompt[number]
    content = f"{PLACEHOLDER}{QUESTION_SEPARATOR}{asked['content'] or ''}"
    return [*prompt[:number], {**asked, "content": content}, *prompt[number + 1 :]]


def texts_of(row: ChatRow) -> list[str]:
    """All texts of a row, in which no special token may be spelled."""
    messages = [*row.prompt, *row.chosen, *row.rejected]
    texts = [text for message in messages for text in message.values() if isinstance(text, str)]
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    texts += [json.dumps(value, ensure_ascii=False) for value in (*calls, row.tools) if value]
    return [*texts, *(text for text in (row.context, row.short_context) if text is not None)]


# --------------------------------------------------------------------------------------------------
# Tokenising
# --------------------------------------------------------------------------------------------------


def encode_chat_row(tokenizer: ChatTokenizer, row: ChatRow) -> Sample:
    """Tokenise a row; without a short context it has no short rows.

    Args:
        tokenizer: tokenizer with its chat template.
        row: the row.

    Returns:
        The sample's pieces, a single turn.

    Raises:
        BadRow: the template does not render the prompt followed by the answers, or puts no special token after an answer.
    """
    if any(message["role"] == "system" for message in row.prompt) and not tokenizer.renders_system:
        raise BadRow("template", "the chat template has no system messages; leave the system message out")
    encoder = Encoder(tokenizer, tools=row.tools)
    prompt, answers = _rendered(encoder, row, row.context)
    pieces = []
    head, tail = _cut(encoder, prompt, row.context) if row.context is not None else ("", prompt)
    if head:
        pieces.append(encoder.piece("", head, CONTEXT))
    pieces.append(encoder.piece(head, tail, PROMPT))
    for parts, side in zip(answers, (Mode.CHOSEN, Mode.REJECTED), strict=True):
        pieces += _pieces(encoder, parts, side)
    if row.short_context is not None:
        prompt, answers = _rendered(encoder, row, row.short_context)
        pieces.append(encoder.piece("", prompt, SHORT_PROMPT))
        for parts, side in zip(answers, (Mode.SHORT_CHOSEN, Mode.SHORT_REJECTED), strict=True):
            pieces += _pieces(encoder, parts, side)
    return Sample(tuple(pieces))


# Of an answer: the assistant's messages, and the texts between them.
_Part = Answer | str


def _rendered(encoder: Encoder, row: ChatRow, context: str | None) -> tuple[str, list[list[_Part]]]:
    """The prompt as text, and the parts of both answers."""
    history = row.prompt
    if context is not None:
        history = [
            {**m, "content": m["content"].replace(PLACEHOLDER, context)} if m["content"] is not None else m
            for m in row.prompt
        ]
    sides = [_parts(encoder, history, answer) for answer in (row.chosen, row.rejected)]
    if sides[0][0] != sides[1][0]:
        raise BadRow("template", "the template renders the prompt differently before another answer")
    return sides[0][0], [parts for _, parts in sides]


def _parts(encoder: Encoder, history: Sequence[Message], messages: Sequence[Message]) -> tuple[str, list[_Part]]:
    """The prompt before an answer, and the answer's parts as the template renders them in the finished dialogue."""
    parts: list[_Part] = []
    first = ""
    # The row up to the last answer, with and without its empty thinking, which may be dropped when the dialogue goes on.
    kept = dropped = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        found = encoder.dialogue.last_answer([*history, *messages[:number]], message)
        if not parts:
            first = found.prompt
        elif found.prompt.startswith(kept):
            parts.append(found.prompt[len(kept) :])
        elif found.prompt.startswith(dropped):
            last = parts[-1]
            assert isinstance(last, Answer)
            parts[-1:] = [Answer(**{**vars(last), "lead": ""}), found.prompt[len(dropped) :]]
        else:
            raise BadRow("template", "the chat template does not render a message after the one before")
        parts.append(found)
        kept = found.prompt + found.lead + found.text
        dropped = found.prompt + found.text
    return first, parts


def _pieces(encoder: Encoder, parts: Sequence[_Part], side: Mode) -> list[Piece]:
    """Pieces of an answer: the assistant's messages have a loss, what stands between them has none."""
    pieces: list[Piece] = []
    end = ""
    for part in parts:
        if isinstance(part, str):
            pieces.append(encoder.piece(end, part, side))
        else:
            pieces += encoder.answer_pieces(part, side | Mode.RESPONSE)
            end = part.end
    return pieces


# Characters on both sides of the cut behind a document that are tokenised to see whether it changes the tokens.
_CUT_CHARACTERS = 256


def _cut(encoder: Encoder, prompt: str, context: str) -> tuple[str, str]:
    """The prompt, cut in two where the document ends; not cut where both sides tokenised alone would be other tokens."""
    for text in (context, context.strip()):
        place = prompt.find(text)
        if place >= 0:
            break
    else:
        raise BadRow("template", "the chat template does not render the context")
    end = place + len(text)
    end = encoder.end_of_document(prompt[:end], prompt[end : end + _CUT_CHARACTERS])
    before, after = prompt[max(0, end - _CUT_CHARACTERS) : end], prompt[end : end + _CUT_CHARACTERS]

    def ids(first: str, text: str) -> list[int]:
        return encoder.piece(first, text, CONTEXT).tokens.tolist()

    if ids("x", before) + ids(before, after) != ids("x", before + after):
        return "", prompt
    return prompt[:end], prompt[end:]


def identical_sides(sample: Sample, sides: tuple[Mode, Mode] = (Mode.CHOSEN, Mode.REJECTED)) -> bool:
    """Whether both rows of a sample have the same tokens with the same losses."""

    def row(side: Mode, counts: Callable[[Piece], bool]) -> list[int]:
        return [int(token) for piece in sample.pieces if piece.mode & side and counts(piece) for token in piece.tokens]

    return all(
        row(sides[0], counts) == row(sides[1], counts)
        for counts in (lambda piece: bool(piece.mode & Mode.RESPONSE), lambda piece: not piece.mode & Mode.RESPONSE)
    )
