"""Option tables from the configuration classes, by introspection."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal, NamedTuple


class OptionRow(NamedTuple):
    """One option, as text for people."""

    name: str
    type: str
    default: str
    doc: str


def option_rows(cls: type) -> list[OptionRow]:
    """Options of a configuration dataclass, in the order of its fields; those of a dataclass inside it are among them.

    An option's doc is the string below its field, or the ``help`` in its annotation. A rule in the annotation (an object
    with a ``rule``, such as "must be positive") is part of the type.

    Raises:
        TypeError: ``cls`` is not a dataclass.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = _strings_below_fields(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint, extras = _without_annotated(hints[field.name])
        if dataclasses.is_dataclass(hint):
            rows += option_rows(hint)  # type: ignore[arg-type]
            continue
        name = next((e.name for e in extras if isinstance(getattr(e, "name", None), str)), field.name)
        help_text = next((e.help for e in extras if isinstance(getattr(e, "help", None), str)), "")
        doc = " ".join((docs.get(field.name) or help_text).split())
        rows.append(OptionRow(name, _type_text(hints[field.name]), _default_text(field), doc))
    return rows


def _strings_below_fields(cls: type) -> dict[str, str]:
    """Docs of attributes, which Python itself does not keep: the string that follows a field in the class's source."""
    docs = {}
    # A subclass may describe a field anew.
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in itertools.pairwise(tree.body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = str(following.value.value)
    return docs


def _without_annotated(hint: Any) -> tuple[Any, list[Any]]:
    extras = []
    while typing.get_origin(hint) is typing.Annotated:
        hint, *more = typing.get_args(hint)
        extras += more
    return hint, extras


def _type_text(hint: Any) -> str:
    hint, extras = _without_annotated(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        text = " or ".join(_type_text(a) for a in arguments if a is not type(None))
    elif origin is Literal:
        text = " \\| ".join(f"`{a}`" for a in arguments)
    elif origin in (tuple, list):
        text = f"list of {_type_text(arguments[0])}"
    else:
        names = {int: "integer", float: "number", str: "text", bool: "switch"}
        text = names.get(hint, getattr(hint, "__name__", str(hint)))
    rules = [
        e.rule.removeprefix("must ").replace("be ", "") for e in extras if isinstance(getattr(e, "rule", None), str)
    ]
    return ", ".join([text, *rules])


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return "required"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (tuple, list)):
        text = ", ".join(map(str, default))
        return f"`{text}`" if len(text) <= 60 else f"{len(default)} entries"
    text = str(default)
    if len(text) > 60:
        return "see `--print-config`"
    return f"`{text}`".replace("|", "\\|")


def option_tables(root: type) -> str:
    """Markdown tables: one per section of a configuration, or one of all options where a class is not made of sections."""
    hints = typing.get_type_hints(root)
    if not all(dataclasses.is_dataclass(hints[field.name]) for field in dataclasses.fields(root)):
        return "\n".join(_table(root))
    parts = []
    for field in dataclasses.fields(root):
        section = hints[field.name]
        purpose = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
        parts += [f"### `{field.name}`", "", purpose, "", *_table(section), ""]
    return "\n".join(parts)


def _table(cls: type) -> list[str]:
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    return lines + [f"| `{r.name}` | {r.type} | {r.default} | {_escaped(r.doc)} |" for r in option_rows(cls)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;").replace("*", "\\*")
