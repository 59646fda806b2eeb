"""Arguments of chat templates, such as ``enable_thinking``: read from a JSON flag, checked, and passed to the template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, TemplateError

from megatron_longpo.errors import ConfigError, DataError
from megatron_longpo.runtime.reading import parse_json

# What the program itself passes: the dialogue and its special tokens, and the parameters of ``apply_chat_template``.
_RESERVED = frozenset(
    (
        *("messages", "conversation", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"),
        *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    )
)


def parse_template_kwargs(text: str | None) -> dict[str, Any]:
    """The value of ``--chat-template-kwargs``.

    Args:
        text: a JSON object, such as ``{"enable_thinking": false}``; None for no arguments.

    Returns:
        The arguments by name, in alphabetical order.

    Raises:
        ConfigError: it is not a JSON object, or holds a name that the program passes itself.
    """
    if text is None:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"chat_template_kwargs={text!r} is not JSON ({error}); write an object such as '{{\"enable_thinking\": false}}'"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"chat_template_kwargs={text!r} is not a JSON object; write one such as '{{\"enable_thinking\": false}}'"
        )
    for name in value:
        if name in _RESERVED or not name.isidentifier():
            reason = "is passed by the program itself" if name in _RESERVED else "is no name of an argument"
            raise ConfigError(f"chat_template_kwargs has {name!r}, which {reason}; leave it out")
    return dict(sorted(value.items()))


def check_template_reads(template: str, kwargs: Mapping[str, Any]) -> None:
    """Check that a template mentions all arguments: one that it does not know would have no effect.

    Args:
        template: source of the template.
        kwargs: arguments by name.

    Raises:
        DataError: it does not mention one.
    """
    if not kwargs:
        return
    try:
        # Lexed, not parsed: that needs no knowledge of the tags that transformers adds to Jinja.
        tokens = Environment(autoescape=True).lex(template)
        names = {value for _, kind, value in tokens if kind == "name"}
    except TemplateError:
        # Reported with its reason when the template is compiled.
        return
    for name in kwargs:
        if name not in names:
            raise DataError(
                f"chat_template_kwargs={json.dumps(dict(kwargs))} has {name!r}, which the chat template does not mention; "
                "correct the name, or leave it out"
            )
