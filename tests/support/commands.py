"""What a command reads from its arguments, without running it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_longpo import cli


class _Read(Exception):
    """The arguments were read; what comes next would do the work."""


def parsed(name: str, arguments: Sequence[str]) -> Any:
    """What a command's parser returns: its flags, or its own flags and the configuration.

    Args:
        name: first words of the command, as ``cli.run`` takes them.
        arguments: the rest of the command line.

    Raises:
        SystemExit: the arguments are refused, or ask for help.
        ConfigError: what ``parse_with_config`` refuses.
    """
    name, prog, rest = cli.resolve(name, "program", arguments)
    if name not in cli.COMMANDS:
        cli.explain(name, prog, rest)
    module = importlib.import_module(f"megatron_longpo.commands.{cli.COMMANDS[name].module}")

    def stopping(parser: Any) -> Any:
        def parse(*args: Any, **kwargs: Any) -> None:
            raise _Read(parser(*args, **kwargs))

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for parser in ("parse", "parse_with_config"):
            if hasattr(module, parser):
                patch.setattr(module, parser, stopping(getattr(module, parser)))
        try:
            cli.function_of(name)(rest, prog=prog)
        except _Read as read:
            return read.args[0]
    raise AssertionError(f"{name} parsed nothing")
