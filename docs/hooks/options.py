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
    """One option of a section, as text for people."""

    name: str
    type: str
    default: str
    doc: str


def option_rows(cls: type) -> list[OptionRow]:
    """Options of a configuration dataclass, in the order of its fields.

    An option's doc is the string below its field, or else the ``help`` or ``description`` found in the field's metadata
    or annotation (tyro's and pydantic's words for it).

    Raises:
        TypeError: ``cls`` is not a dataclass.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = _strings_below_fields(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint, extras = _without_annotated(hints[field.name])
        extras += list(field.metadata.values()) if field.metadata else []
        name = next((e.name for e in extras if isinstance(getattr(e, "name", None), str)), field.name)
        doc = docs.get(field.name) or next((d for d in map(_described, [*extras, field.default]) if d), "")
        rows.append(OptionRow(name, _type_text(hint), _default_text(field), " ".join(doc.split())))
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


def _described(extra: Any) -> str | None:
    for attribute in ("help", "description"):
        text = getattr(extra, attribute, None)
        if isinstance(text, str):
            return text
    return None


def _type_text(hint: Any) -> str:
    hint, _ = _without_annotated(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_type_text(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return " \\| ".join(f"`{a}`" for a in arguments)
    if origin in (tuple, list):
        return f"list of {_type_text(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "switch"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    # A pydantic field stands where its default is expected.
    default = getattr(default, "default", default)
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (tuple, list)):
        if not default:
            return ""
        text = ", ".join(map(str, default))
        return f"`{text}`" if len(text) <= 60 else f"{len(default)} entries"
    text = str(default)
    if len(text) > 60:
        return "see `--print-config`"
    return f"`{text}`".replace("|", "\\|")


def option_tables(root: type) -> str:
    """Markdown tables of a configuration, one per section."""
    parts = []
    for section in dataclasses.fields(root):
        default = section.default_factory() if section.default_factory is not dataclasses.MISSING else section.default
        cls = type(default)
        purpose = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        parts += [f"### `{section.name}`", "", purpose, ""]
        parts += ["| option | value | default | meaning |", "|---|---|---|---|"]
        parts += [f"| `{row.name}` | {row.type} | {row.default} | {_escaped(row.doc)} |" for row in option_rows(cls)]
        parts.append("")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;").replace("*", "\\*")
