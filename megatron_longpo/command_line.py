"""How commands read their flags: tyro on dataclasses, with a YAML file below the flags where a command has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import tyro

from megatron_longpo.config import from_yaml

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is off unless given, without a ``--no-`` form."""

Flags = TypeVar("Flags")
Options = TypeVar("Options", bound="ConfigOptions")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class ConfigOptions:
    """Where a configuration comes from besides its flags."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """Configuration as YAML. Flags override it."""
    print_config: Switch = False
    """Print the resulting configuration as YAML and stop."""


@dataclass(frozen=True)
class _Line(Generic[Options, Settings]):
    options: Annotated[Options, tyro.conf.arg(name="")]
    settings: Annotated[Settings, tyro.conf.arg(name="")]


def parse(
    cls: type[Flags],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Flags | None = None,
    quiet: bool = False,
) -> Flags:
    """Read flags into a dataclass. Nested dataclasses group flags in the help and do not prefix their names.

    Exits with status 2 on flags that cannot be read and with 0 after ``--help``.

    Args:
        cls: the dataclass. A field without a default is a required flag.
        prog: name of the program in the help.
        description: what the command does.
        default: values of flags that are not given; without it, the defaults of the fields.
        quiet: print nothing (on ranks other than the first).
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        cls,
        prog=prog,
        description=description,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=not quiet,
        **extra,
    )


def parse_with_config(
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    options: type[Options],
    quiet: bool = False,
) -> tuple[Options, Settings]:
    """Read ``--config FILE`` and flags into a configuration. Precedence: flag, then YAML, then default.

    Args:
        settings: the configuration, a dataclass of sections.
        options: the command's own flags, ``--config`` among them.
        prog, description, quiet: as for ``parse``.

    Raises:
        ConfigError: the YAML file cannot be used.
    """
    # The file's values are the defaults of the flags, so the name of the file is read before them.
    chosen, _ = tyro.cli(
        options,
        prog=prog,
        args=list(arguments),
        return_unknown_args=True,
        add_help=False,
        console_outputs=not quiet,
    )
    base = settings() if chosen.config is None else from_yaml(chosen.config, settings)
    line = parse(
        _Line[options, settings],  # type: ignore[valid-type]
        arguments,
        prog=prog,
        description=description,
        default=_Line(options(), base),
        quiet=quiet,
    )
    return line.options, line.settings


def given_flags(settings: type[Any], arguments: Sequence[str]) -> frozenset[str]:
    """Fields of a configuration's sections whose flags are on a command line.

    Args:
        settings: the configuration, a dataclass of sections.
        arguments: the command line.
    """
    flags = {argument.split("=", 1)[0].replace("_", "-") for argument in arguments if argument.startswith("--")}
    default = settings()
    names = {
        f.name for section in dataclasses.fields(settings) for f in dataclasses.fields(getattr(default, section.name))
    }
    return frozenset(
        n for n in names if flags.intersection((f"--{n}".replace("_", "-"), f"--no-{n}".replace("_", "-")))
    )
