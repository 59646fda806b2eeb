"""Where answers stand in the text that a chat template renders.

What a template renders for an answer depends on where the answer stands. Some templates open a block of thinking in the prompt
(R1), put an empty one before the last answer and drop it once the dialogue goes on (Qwen3), end the whole dialogue with one more
token, or end an answer only by the token of the next speaker (GLM-4). So answers are located, not cut off behind a prompt:

- the last one behind its prompt, or, where the finished dialogue does not begin with that, behind the header that both share;
- earlier ones in the dialogue that goes on, by rendering it once more with a word of our own in the place of each answer;
- all of them by ``{% generation %}`` marks where the template has these.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_longpo.data.preference import BadRow

Message = dict[str, Any]

# Thinking without a thought. It is rendered, not written by the model, so it has no loss.
_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\n{0,2}")
_END_OF_OPENED = re.compile(r"\s*</think>\n{0,2}")
_OPENING = re.compile(r"\s*<think>[ \t]*\n?")
# Stands for the answer of a number.
_WORD = "Answer{}e5b1c"


@dataclass(frozen=True)
class TurnEnd:
    """The special token that ends an answer.

    Attributes:
        text: its text.
        token: its id.
        is_rendered: whether it also follows the last answer of a dialogue; otherwise it is added there.
    """

    text: str
    token: int
    is_rendered: bool


class Renderer(Protocol):
    """What is asked of a tokenizer."""

    @property
    def special_texts(self) -> tuple[str, ...]: ...

    @property
    def marks_answers(self) -> bool: ...

    @property
    def turn_end(self) -> TurnEnd | None: ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str: ...

    def render_marked(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None
    ) -> tuple[str, list[tuple[int, int]]]: ...


@dataclass(frozen=True)
class Answer:
    """An answer as text.

    Attributes:
        prompt: everything before it.
        lead: empty thinking between the prompt and the answer.
        text: the answer, with its end of turn.
        end: text of the end of turn.
        rest: what the template puts after it.
        continues_prompt: whether the dialogue up to the answer, rendered without a prompt, begins with the prompt and holds the
            end of turn.
        content: the answer without its end of turn.
    """

    prompt: str
    lead: str
    text: str
    end: str
    rest: str
    continues_prompt: bool
    content: str


class Dialogue:
    """Locates answers in dialogues that a tokenizer's template renders.

    Args:
        tokenizer: the tokenizer.
        tools: tools that the model may call, as JSON schemas.
    """

    def __init__(self, tokenizer: Renderer, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._tokenizer = tokenizer
        self._more = {} if tools is None else {"tools": tools}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render a conversation."""
        return self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt, **self._more)

    def last_answer(self, history: Sequence[Message], answer: Message) -> Answer:
        """Locate an answer that ends a dialogue.

        Args:
            history: the messages before it.
            answer: the assistant's message.

        Raises:
            BadRow: the template does not render the answer after its prompt, or puts no special token after it.
        """
        prompt = self.render(history, add_generation_prompt=True)
        messages = [*history, answer]
        whole, places = self._render_marked(messages, add_generation_prompt=False)
        continues = whole.startswith(prompt)
        if places and continues:
            # A mark may begin with what the prompt already has.
            return self._marked(whole, max(places[-1][0], len(prompt)), places[-1][1])
        text = whole[len(prompt) :] if continues else self._behind_opened(history, answer, prompt, whole)
        lead = _lead(prompt, text)
        text = text[len(lead) :]
        end = self._tokenizer.turn_end
        if end is not None and not end.is_rendered:
            content = text
            return Answer(prompt, lead, content + end.text, end.text, "", continues_prompt=False, content=content)
        cut, end_text = self._last_end(text)
        # The model does not write what follows the end-of-turn token (in ChatML, a line feed).
        return Answer(
            prompt=prompt,
            lead=lead,
            text=text[:cut],
            end=end_text,
            rest=text[cut:],
            continues_prompt=continues,
            content=text[: cut - len(end_text)],
        )

    def _last_end(self, text: str) -> tuple[int, str]:
        """Place after the end of turn in a text that follows a prompt, and the end's text."""
        end = self._tokenizer.turn_end
        if end is not None and end.text in text:
            return text.rfind(end.text) + len(end.text), end.text
        # Calls of tools may end with another.
        ends = [(text.rfind(t) + len(t), t) for t in self._tokenizer.special_texts if t and t in text]
        if not ends:
            raise BadRow("no_end_of_turn", "the chat template ends an answer with no special token")
        return max(ends)

    def _marked(self, whole: str, start: int, end: int) -> Answer:
        """An answer that the template marks."""
        lead = _lead(whole[:start], whole[start:end])
        text = whole[start + len(lead) : end]
        turn_end = self._tokenizer.turn_end
        # Some marks include what follows the end of turn.
        cut = text.rfind(turn_end.text) + len(turn_end.text) if turn_end and turn_end.text in text else len(text)
        end_text = turn_end.text if turn_end and text[:cut].endswith(turn_end.text) else ""
        return Answer(
            prompt=whole[:start],
            lead=lead,
            text=text[:cut],
            end=end_text,
            rest=whole[start + len(lead) + cut :],
            continues_prompt=True,
            content=text[: cut - len(end_text)],
        )

    def _render_marked(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, with the places of the answers if the template marks each of them."""
        if not self._tokenizer.marks_answers:
            return self.render(messages, add_generation_prompt=add_generation_prompt), []
        text, parts = self._tokenizer.render_marked(messages, add_generation_prompt=add_generation_prompt, **self._more)
        places: list[tuple[int, int]] = []
        for start, end in parts:
            # An answer may be marked in several parts.
            if places and places[-1][1] == start:
                places[-1] = (places[-1][0], end)
            else:
                places.append((start, end))
        return text, places if len(places) == sum(m["role"] == "assistant" for m in messages) else []

    def _behind_opened(self, history: Sequence[Message], answer: Message, prompt: str, whole: str) -> str:
        """Text of an answer behind a prompt that opens a block which the dialogue without a prompt does not have."""
        content = answer.get("content")
        header, after = self._around_answer(history)
        before_thinking = _without_thinking(header)
        if answer.get("tool_calls") or not isinstance(content, str) or not prompt.startswith(before_thinking):
            raise BadRow("template", "the chat template does not render an answer after its prompt")
        if "<think>" in prompt[len(before_thinking) :]:
            empty, opened = _EMPTY_THINKING.match(content), _OPENING.match(content)
            is_closed = "</think>" in prompt[len(before_thinking) :]
            # The prompt has it already.
            if is_closed and empty:
                content = content[empty.end() :]
            elif not is_closed and opened:
                content = content[opened.end() :]
        is_verbatim = whole.startswith((header + content, before_thinking + content))
        return (content if is_verbatim else content.strip()) + after

    def _around_answer(self, history: Sequence[Message]) -> tuple[str, str]:
        """Text before and after an answer that ends a dialogue."""
        word = _WORD.format(0)
        text = self.render([*history, {"role": "assistant", "content": word}], add_generation_prompt=False)
        before, found, after = text.rpartition(word)
        if not found:
            raise BadRow("template", "the chat template does not render an answer")
        return before, after

    def earlier_answers(self, history: Sequence[Message]) -> tuple[list[str], list[Answer]]:
        """Locate the answers of a dialogue that goes on, as its next prompt renders them.

        Args:
            history: messages; the last is not the assistant's.

        Returns:
            The texts between the answers: before the first, and after the end of turn of each (one more than answers); and the
            answers. What stands between a header and an answer (in Mistral, a space) belongs to the answer.

        Raises:
            BadRow: the template renders an answer by more than its place, or not at all.
        """
        text, places = self._render_marked(history, add_generation_prompt=True)
        if places:
            return self._between_marks(text, places)
        numbered = [
            {"role": "assistant", "content": _WORD.format(number)} if m["role"] == "assistant" else m
            for number, m in enumerate(history)
        ]
        frame = self.render(numbered, add_generation_prompt=True)
        between = []
        for message in (m for m in numbered if m["role"] == "assistant"):
            part, found, frame = frame.partition(message["content"])
            if not found:
                raise BadRow("template", "the chat template does not render an answer of an earlier turn")
            between.append(part)
        between.append(frame)
        prompts, answers, before = [between[0]], [], between[0]
        usual = self._space_before_answer()
        for content, after in zip(self._contents(text, between), between[1:], strict=True):
            space = usual if before.endswith(usual) else ""
            prompts[-1] = prompts[-1].removesuffix(space)
            cut, end = self._first_end(after)
            answers.append(
                Answer("", "", space + content + after[:cut], end, "", continues_prompt=True, content=content)
            )
            prompts.append(after[cut:])
            before = after
        return prompts, answers

    def _space_before_answer(self) -> str:
        """What stands between a prompt and its answer, other than empty thinking."""
        question = [{"role": "user", "content": "Question"}]
        prompt = self._tokenizer.render(question, add_generation_prompt=True)
        header, _ = Dialogue(self._tokenizer)._around_answer(question)
        gap = header[len(prompt) :] if header.startswith(prompt) else ""
        return gap[len(_lead(prompt, gap)) :]

    @staticmethod
    def _contents(text: str, between: Sequence[str]) -> Iterator[str]:
        """What a text has in the gaps between given parts."""
        problem = BadRow("template", "the template renders a turn's prompt differently after another answer")
        if not text.startswith(between[0]) or not text.endswith(between[-1]):
            raise problem
        place = len(between[0])
        for number, part in enumerate(between[1:], 1):
            end = len(text) - len(part) if number == len(between) - 1 else text.find(part, place)
            if end < place:
                raise problem
            yield text[place:end]
            place = end + len(part)

    def _first_end(self, text: str) -> tuple[int, str]:
        """Place after the end of turn in a text that follows an answer's content, and the end's text."""
        end = self._tokenizer.turn_end
        if end is not None and end.text in text:
            return text.find(end.text) + len(end.text), end.text
        ends = [(text.find(t), -len(t), t) for t in self._tokenizer.special_texts if t and t in text]
        if not ends:
            raise BadRow("no_end_of_turn", "the chat template ends an answer with no special token")
        place, _, found = min(ends)
        return place + len(found), found

    def _between_marks(self, text: str, places: Sequence[tuple[int, int]]) -> tuple[list[str], list[Answer]]:
        """``earlier_answers`` of a template that marks them."""
        prompts, answers, place = [], [], 0
        opening = self._marked_opening()
        for start, end in places:
            start += len(next(part for part in opening if text.startswith(part, start)))
            prompts.append(text[place:start])
            answers.append(self._marked(text, start, end))
            place = len(text) - len(answers[-1].rest)
        return [*prompts, text[place:]], answers

    def _marked_opening(self) -> tuple[str, ...]:
        """What a mark may begin with although the prompt has it already: its longest form first, nothing last."""
        question = [{"role": "user", "content": "Question"}]
        prompt = self._tokenizer.render(question, add_generation_prompt=True)
        word = _WORD.format(0)
        whole, places = self._render_marked(
            [*question, {"role": "assistant", "content": word}], add_generation_prompt=False
        )
        start = places[0][0] if places else len(prompt)
        opening = common_beginning(prompt[start:], whole[start:].partition(word)[0])
        # Without a block of thinking, which is dropped from earlier turns.
        return opening, opening[: len(opening) - len(opening.lstrip())], ""

    def after_answer(self, history: Sequence[Message], following: Sequence[Message]) -> str:
        """Text from an answer's end of turn, exclusive, to the next answer.

        Args:
            history: messages before the answer.
            following: messages after it, up to the next answer.
        """
        word = _WORD.format(0)
        messages = [*history, {"role": "assistant", "content": word}, *following]
        _, found, after = self.render(messages, add_generation_prompt=True).rpartition(word)
        if not found:
            raise BadRow("template", "the chat template does not render an answer of an earlier turn")
        return after[self._first_end(after)[0] :]


def common_beginning(first: str, second: str) -> str:
    """What two texts both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(sign for sign, _ in pairs)


def _lead(prompt: str, text: str) -> str:
    """Empty thinking at the beginning of a text that follows a prompt."""
    is_opened = prompt.rstrip().endswith("<think>")
    found = (_END_OF_OPENED if is_opened else _EMPTY_THINKING).match(text)
    return found[0] if found else ""


def _without_thinking(header: str) -> str:
    """A header without empty thinking, or an opened block, at its end."""
    return re.sub(r"<think>\s*(</think>\s*)?\Z", "", header)
