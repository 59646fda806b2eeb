"""Types and rules of configuration fields and of JSON files, read from the annotations of their dataclasses.

A rule stands in the annotation of its field, ``beta: Annotated[float, Range(gt=0, fix="the paper uses 0.1")]``. YAML
sections, command-line flags, data manifests and ``model.json`` all go through the functions below, so that a value is
refused in the same words wherever it comes from.

Why not pydantic dataclasses (tried with 2.14): a float field accepts ``true``, and its strict form refuses YAML's
``5e-7``, which is text to a YAML 1.1 reader, so each type would need a validator of its own; rules run in the
constructor, before a flag can override what a YAML file says; and an error that a flag causes is caught and printed by
tyro in pydantic's words.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_longpo.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Bounds of a number.

    NaN is never in range. Infinity is, where no upper bound excludes it: as a limit it means "no limit".

    Attributes:
        gt, ge: lower bound, exclusive or inclusive.
        lt, le: upper bound, exclusive or inclusive. ``lt=math.inf`` asks for a finite number.
        fix: what the error suggests; by default, to raise or to lower the number.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    fix: str | None = None

    def contains(self, value: float) -> bool:
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def fix_of(self, value: float) -> str:
        """What the error suggests for a value out of range."""
        too_large = (self.lt is not None and value >= self.lt) or (self.le is not None and value > self.le)
        return self.fix or f"{'lower' if too_large else 'raise'} it, or leave it out for the default"

    @property
    def rule(self) -> str:
        """The rule in words, as an error states it."""
        lower = self.gt if self.ge is None else self.ge
        upper = self.lt if self.le is None else self.le
        if lower is not None and upper is not None and upper != math.inf:
            return f"must be in {'(' if self.ge is None else '['}{lower:g}, {upper:g}{')' if self.le is None else ']'}"
        parts = []
        if upper is not None:
            parts.append("finite" if upper == math.inf else f"{'below' if self.le is None else 'at most'} {upper:g}")
        if lower is not None:
            bound = f"{'above' if self.ge is None else 'at least'} {lower:g}"
            parts.append(bound if lower else "positive" if self.ge is None else "not negative")
        return "must not be negative" if parts == ["not negative"] else f"must be {' and '.join(parts)}"


Count = Annotated[int, Range(ge=1)]
"""A whole number of at least 1."""
NaturalNumber = Annotated[int, Range(ge=0)]
"""A whole number of at least 0."""
PositiveFloat = Annotated[float, Range(gt=0)]
PositiveFiniteFloat = Annotated[float, Range(gt=0, lt=math.inf)]
FiniteFloat = Annotated[float, Range(lt=math.inf)]
ModelSizeFactor = Annotated[float, Range(ge=1, le=1000, fix="1 allows 4096 layers, a vocabulary of 2^24, ...")]
"""How far a model may exceed the limits of its sizes."""
Temperature = Annotated[float, Range(ge=0, lt=math.inf, fix="0 is greedy decoding")]
TopP = Annotated[float, Range(gt=0, le=1, fix="1 keeps all tokens")]


# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------


def convert_fields(
    cls: type, values: Mapping[str, Any], where: str, error: type[Exception] = ConfigError, fix: str = ""
) -> dict[str, Any]:
    """Plain values, as YAML or JSON hold them, converted to the types of a dataclass's fields.

    Args:
        cls: the dataclass.
        values: field name -> value. Fields may be missing.
        where: beginning of an error message, put before the name of the key.
        error: exception to raise.
        fix: end of an error message.

    Raises:
        error: an unknown key, or a value of the wrong type.
    """
    hints = _hints(cls)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            raise error(f"{where}{key} is unknown; {nearest(str(key), hints)}{fix and '; ' + fix}")
        try:
            converted[key] = _convert(value, hints[key])
        except _WrongType:
            rule = f"must be {describe(hints[key])}"
            raise error(f"{where}{key}={value!r} is {kind_of(value)}; it {rule}{fix and '; ' + fix}") from None
    return converted


class _WrongType(Exception):
    """A value does not have the type of its annotation."""


def _convert(value: Any, hint: Any) -> Any:
    """The value as an annotation wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option)
            except _WrongType:
                continue
        raise _WrongType
    if origin in (tuple, list, dict):
        return _convert_container(value, origin, arguments)
    return _convert_scalar(value, hint, choices=arguments)


def _convert_container(value: Any, kind: Any, arguments: tuple[Any, ...]) -> Any:
    """In a tuple of texts YAML reads an item such as 8192 or 0.7 as a number, so numbers are accepted there."""
    if kind is dict and isinstance(value, dict):
        return {_convert(k, arguments[0]): _convert(v, arguments[1]) for k, v in value.items()}
    if kind is dict or not isinstance(value, (list, tuple) if kind is tuple else list):
        raise _WrongType
    if kind is tuple and arguments[0] is str:
        return tuple(str(v) if type(v) in (int, float) else _convert(v, str) for v in value)
    return kind(_convert(v, arguments[0]) for v in value)


def _convert_scalar(value: Any, hint: Any, choices: tuple[Any, ...]) -> Any:
    """YAML 1.1 reads 5e-7 as text, so text is accepted for a float. A bool is an int to Python, but not to a user."""
    if hint is Any or type(value) is hint or any(value == c and type(value) is type(c) for c in choices):
        return value
    if hint is float and type(value) in (int, str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise _WrongType


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"a list of {_PLURALS[_plain(arguments[0])]}"
    if origin is dict:
        return "a mapping" if arguments[1] is Any else f"a mapping of {_PLURALS[_plain(arguments[1])]}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return names[hint]


_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", dict: "mappings", tuple: "lists"}


def _plain(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def kind_of(value: Any) -> str:
    """The type of a plain value in words."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        type(None): "null",
        bool: "a switch",
        int: "a whole number",
        float: "a floating-point number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggestion for a misspelt name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _hints(cls: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in typing.get_type_hints(cls, include_extras=True).items() if k in names}


# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


def check_ranges(section: Any) -> None:
    """Check every number of a dataclass, and of the dataclasses in its fields, against the range it is annotated with.

    Raises:
        ConfigError: the first number out of range.
    """
    for name, hint in _hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif value is not None:
            for bounds in _ranges(hint):
                if not bounds.contains(value):
                    raise ConfigError(f"{name}={value} {bounds.rule}; {bounds.fix_of(value)}")


def _ranges(hint: Any) -> Iterator[Range]:
    if typing.get_origin(hint) is Annotated:
        yield from (m for m in hint.__metadata__ if isinstance(m, Range))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _ranges(option)
