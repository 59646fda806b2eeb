"""Chat templates as transformers compiles them, with a fixed date, and with the places of the answers that a template marks."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, Template, TemplateError

# What a template calls for the current date and time; transformers passes it.
_CLOCK = "strftime_now"


def compiled(template: str, date: datetime.date) -> Template:
    """A chat template, compiled as transformers does, whose date is fixed.

    transformers keeps compiled templates, so ``apply_chat_template`` sees the same date from here on.

    Args:
        template: source of the template.
        date: what ``strftime_now`` tells; the time of day is midnight.
    """
    # Imports torch, which commands that only print their help should not wait for. The names are private: read in 4.46.3, tested
    # with 5.23. Compiling by other means would render some templates differently.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    made: Template = _compile_jinja_template(template)
    moment = datetime.datetime.combine(date, datetime.time())
    made.globals[_CLOCK] = moment.strftime
    return made


def render_marked(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and find what stands in ``{% generation %}`` blocks.

    Args:
        template: the compiled template.
        messages: the conversation.
        add_generation_prompt: whether the text ends where the model answers.
        tools: tools that the model may call.
        arguments: other variables of the template.

    Returns:
        The text, and first and last place (exclusive) of each block in it.
    """
    from transformers.utils.chat_template_utils import _render_with_assistant_indices

    text, places = _render_with_assistant_indices(
        compiled_template=template,
        messages=list(messages),
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **arguments,
    )
    return text, [(int(start), int(end)) for start, end in places]


def asks_for_date(template: str) -> bool:
    """Whether a template asks for the current date."""
    return any(kind == "name" and value == _CLOCK for kind, value in _tokens(template))


def marks_answers(template: str) -> bool:
    """Whether a template marks what the model writes, with ``{% generation %}``."""
    tokens = _tokens(template)
    return any(
        before == "block_begin" and kind == "name" and value == "generation"
        for (before, _), (kind, value) in itertools.pairwise(tokens)
    )


def _tokens(template: str) -> list[tuple[str, str]]:
    """Kinds and values of a template's tokens, without white space; nothing for one that is no template."""
    try:
        # Lexed, not parsed: that needs no knowledge of the tags that transformers adds to Jinja.
        return [(kind, value) for _, kind, value in Environment(autoescape=True).lex(template) if kind != "whitespace"]
    except TemplateError:
        # Reported with its reason when the template is compiled.
        return []
